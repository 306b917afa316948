import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import DTYPES, sparse

from secateurs.runtime.format import mask_of, pack, row_offsets, unpack, values_of
from secateurs.runtime.layout import Layout


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.sampled_from(DTYPES),
    st.integers(0, 100),
)
def test_a_packed_weight_is_the_documented_bytes(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int
) -> None:
    weight = sparse(rows, columns, sparsity, dtype, seed)
    packed, layout = pack(weight)
    # Read as docs/format.md says, bit by bit, in the order of the rows.
    data, row_bytes = packed.numpy().tobytes(), -(-columns // 64) * 8
    kept = [
        [data[row * row_bytes + column // 8] >> column % 8 & 1 for column in range(columns)]
        for row in range(rows)
    ]
    assert torch.equal(torch.tensor(kept, dtype=torch.bool), weight != 0)
    values = weight[weight != 0].view(torch.uint8).numpy().tobytes()
    assert data[rows * row_bytes :] == values + bytes(64)
    assert torch.equal(unpack(packed, layout), weight)
    counts = [0, *np.cumsum((weight != 0).sum(1).numpy())]
    assert row_offsets("w", packed, layout).tolist() == counts


def test_negative_zeros_are_zeros() -> None:
    weight = torch.tensor([[-0.0, 1.0, 0.0, -2.0]])
    packed, layout = pack(weight)
    assert layout.nonzeros == 2
    assert torch.equal(unpack(packed, layout).signbit(), torch.tensor([[False, False, False, True]]))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.9, 0.95])
def test_size_is_within_3_percent_of_the_formula(sparsity: float) -> None:
    weight = sparse(1024, 1024, sparsity, torch.bfloat16)
    packed, layout = pack(weight)
    in_memory = packed.nbytes + row_offsets("w", packed, layout).nbytes
    formula = ((weight != 0).float().mean().item() * 2 + 1 / 8) * weight.numel()
    assert in_memory == pytest.approx(formula, rel=0.03)


def test_values_that_are_not_aligned_are_read_all_the_same() -> None:
    weight = sparse(3, 70, 0.5, torch.float32)
    packed, layout = pack(weight)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:]
    assert torch.equal(values_of(shifted, layout), weight[weight != 0])


def test_a_mask_that_lies_is_refused() -> None:
    packed, layout = pack(sparse(4, 70, 0.5, torch.bfloat16))
    for damage, message in [
        (lambda p: p[:-1], "should be"),
        (lambda p: torch.cat([p, p[:1]]), "should be"),
        (lambda p: p.view(torch.int8), "should be"),
        (lambda p: _flip(p, layout, 0, 5), "bits in its mask"),
        (lambda p: _flip(p, layout, 3, 70), "beyond its 70 columns"),
        (lambda p: _flip(p, layout, 1, 127), "beyond its 70 columns"),
    ]:
        with pytest.raises(ValueError, match=f"'layer'.*{message}"):
            row_offsets("layer", damage(packed.clone()), layout)


def _flip(packed: torch.Tensor, layout: Layout, row: int, column: int) -> torch.Tensor:
    mask_of(packed, layout)[row, column // 8] ^= 1 << column % 8
    return packed


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [2, 3], "values": "bfloat16"}, "needs 'shape'"),
        ({"shape": [2, 3], "values": "bfloat16", "nonzeros": 1, "more": 1}, "needs 'shape'"),
        (None, "needs 'shape'"),
        ({"shape": [2, 3], "values": "int4", "nonzeros": 1}, "needs .* 'bytes' and 'dtype'"),
        ({"shape": [2, 3], "values": "int8", "nonzeros": 1}, "needs .* 'bytes' and 'dtype'"),
        ({"shape": [2, 3], "values": "float8", "nonzeros": 1}, "unknown"),
        ({"shape": [2, 3], "values": 3, "nonzeros": 1}, "unknown"),
        ({"shape": [2, -3], "values": "float16", "nonzeros": 1}, "positive sizes"),
        ({"shape": [2, True], "values": "float16", "nonzeros": 1}, "positive sizes"),
        ({"shape": [2, 3, 4], "values": "float16", "nonzeros": 1}, "positive sizes"),
        ({"shape": [2**16, 2**16], "values": "float16", "nonzeros": 1}, "at most 2\\^31"),
        ({"shape": [2**26, 1], "values": "float16", "nonzeros": 1}, "at most 2\\^31"),
        ({"shape": [2, 3], "values": "float16", "nonzeros": 7}, "promises 7"),
        ({"shape": [2, 3], "values": "float16", "nonzeros": -1}, "promises -1"),
        ({"shape": [2, 3], "values": "float16", "nonzeros": 1.0}, "promises 1.0"),
    ],
)
def test_an_entry_that_lies_is_refused(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"'layer'.*{message}"):
        Layout.from_json("layer", entry)


def test_entries_survive_json() -> None:
    layout = Layout(3, 4, 5, torch.float16)
    assert Layout.from_json("layer", layout.to_json()) == layout
