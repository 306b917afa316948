"""Packed values of a few bits: where the codes lie against docs/format.md written out bit by bit, products
against float64, and what a broken file says."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import DTYPES, sparse
from torch import Tensor

from secateurs.runtime import kernels
from secateurs.runtime.codes import pack_codes, row_bytes, unpack_codes, word_counts
from secateurs.runtime.format import (
    Grid,
    layout_of,
    layout_of_experts,
    pack,
    pack_experts,
    row_offsets,
    unpack,
)
from secateurs.runtime.kernels import expand, sparse_linear
from secateurs.runtime.layout import Codes, Layout, read_layout
from secateurs.values import Values

KINDS = [
    Values(bits, group, grid)
    for bits in (8, 4, 3, 2)
    for group in (32, 64, 128)
    for grid in ("whole", "half")
    if bits < 8 or grid == "whole"
]

kinds = st.sampled_from(KINDS)
shares = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


def rounded(
    rows: int, columns: int, sparsity: float, values: Values, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Grid]:
    """A weight (rows, columns) on a grid, and the grid."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(rows, values.groups(columns), generator=generator).mul_(0.1).bfloat16()
    codes = torch.randint(0, 2**values.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    weight = values.decode(codes, scales).to(dtype)
    kept = torch.rand(rows, columns, generator=generator) >= sparsity
    return torch.where(kept, weight, 0.0) + 0.0, (values, scales)


def largest(grid: Grid, columns: int) -> Tensor:
    """(rows, columns) float64, the largest that each weight could be: floats carry sums of that size."""
    values, scales = grid
    return values.spread(scales.double().abs(), columns) * -values.lowest


def written_out(codes: Tensor, kept: Tensor, values: Values) -> list[list[int]]:
    """Each row's bytes, code by code."""
    lines = []
    for row, places in zip(codes.tolist(), kept.tolist(), strict=True):
        if values.bits == 4:
            span = max(values.group, 64)
            halves = [
                [code for j, code in enumerate(row) if places[j] and j // span % 2 == half] for half in (0, 1)
            ]
            line = [0] * max(map(len, halves))
            for half, found in enumerate(halves):
                for i, code in enumerate(found):
                    line[i] += code * 16**half
        else:
            line = []
            for first in range(0, len(row), 64):
                number = count = 0
                for j in range(first, first + 64):
                    if places[j]:
                        number += row[j] << values.bits * count
                        count += 1
                line += number.to_bytes(-(-count * values.bits // 8), "little")
        lines.append(line)
    return lines


@settings(max_examples=100, deadline=None)
@given(kinds, st.integers(1, 5), st.integers(1, 7), shares, st.integers(0, 1000))
def test_codes_lie_where_they_are_said_to(
    values: Values, rows: int, words: int, sparsity: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**values.bits, (rows, 64 * words), generator=generator, dtype=torch.uint8)
    kept = torch.rand(rows, 64 * words, generator=generator) >= sparsity
    codes *= kept
    lines = written_out(codes, kept, values)
    packed = pack_codes(codes, kept, values)
    assert packed.tolist() == [byte for line in lines for byte in line]
    assert row_bytes(word_counts(kept), values).tolist() == [len(line) for line in lines]
    assert torch.equal(unpack_codes(packed, kept, values), codes)


def test_many_rows_are_packed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values, kept = Values(3), torch.rand(9, 128) > 0.5
    codes = torch.randint(0, 8, (9, 128), dtype=torch.uint8) * kept
    whole = pack_codes(codes, kept, values)
    monkeypatch.setattr("secateurs.runtime.codes.AT_ONCE", 256)
    assert torch.equal(pack_codes(codes, kept, values), whole)
    assert torch.equal(unpack_codes(whole, kept, values), codes)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds,
    st.integers(1, 70),
    st.integers(1, 1200),
    st.integers(1, 30),
    shares,
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 1000),
)
def test_products_of_any_shape(
    path: str,
    values: Values,
    rows: int,
    columns: int,
    tokens: int,
    sparsity: float,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    has_bias: bool,
    seed: int,
) -> None:
    weight, grid = rounded(rows, columns, sparsity, values, dtype, seed)
    packed, layout = pack(weight, grid)
    assert layout.codes is not None
    offsets = row_offsets("w", packed, layout)
    # What it was packed from comes back, and by every path.
    assert torch.equal(unpack(packed, layout), weight)
    first = rows // 2
    assert torch.equal(expand(packed, offsets, layout, first, rows), weight[first:])
    x = torch.randn(tokens, columns).mul_(10 * torch.rand(columns)).to(x_dtype)
    bias = torch.randn(rows).to(x_dtype) if has_bias else None
    y = sparse_linear(x, packed, offsets, bias, layout)
    assert y.dtype == x_dtype
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    # Activations are rounded to 127 steps of a group's largest: half a step each, or they are not at all.
    padding = values.groups(columns) * values.group - columns
    groups = torch.nn.functional.pad(x.double().abs(), (0, padding)).unflatten(1, (-1, values.group))
    step = groups.amax(2).repeat_interleave(values.group, 1)[:, :columns] / 127
    size = x.double().abs() @ largest(grid, columns).T
    unit = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
    tolerance = 0.501 * (step @ weight.double().abs().T) + unit[x_dtype] * exact.abs()
    tolerance += (unit[dtype] + 2.0**-16) * size + 1e-6
    assert ((y.double() - exact).abs() <= tolerance).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds, st.integers(1, 40), st.integers(1, 700), st.integers(1, 20), shares, st.integers(0, 1000))
def test_sums_of_a_group_are_exact(
    path: str, values: Values, rows: int, columns: int, tokens: int, sparsity: float, seed: int
) -> None:
    """Activations that are whole numbers up to 127 in every group need no rounding: nothing is lost."""
    weight, grid = rounded(rows, columns, sparsity, values, torch.float32, seed)
    packed, layout = pack(weight, grid)
    x = torch.randint(-127, 128, (tokens, columns), generator=torch.Generator().manual_seed(seed)).float()
    x[:, :: values.group] = 127
    y = sparse_linear(x, packed, row_offsets("w", packed, layout), None, layout)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ largest(grid, columns).T
    assert ((y.double() - exact).abs() <= 2.0**-20 * size + 1e-30).all()


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 259, 520])
@pytest.mark.parametrize("values", [Values(4), Values(3, 128, "half")], ids=str)
def test_two_threads_and_several_panels(
    path: str, values: Values, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PANEL_BYTES", 100_000)
    threads = torch.get_num_threads()
    weight, grid = rounded(500, 700, 0.6, values, torch.bfloat16)
    weight[:200] = 0
    packed, layout = pack(weight, grid)
    x = torch.randn(tokens, 700).bfloat16()
    try:
        torch.set_num_threads(2)
        y = sparse_linear(x, packed, row_offsets("w", packed, layout), None, layout)
    finally:
        torch.set_num_threads(threads)
    exact = x.double() @ weight.double().T
    assert (y.double() - exact).norm() < 0.02 * exact.norm()
    assert not y[:, :200].any()


def test_a_token_does_not_depend_on_those_beside_it(path: str) -> None:
    """Of many: fewer are summed in another order."""
    weight, grid = rounded(70, 1100, 0.5, Values(4), torch.bfloat16)
    packed, layout = pack(weight, grid)
    offsets, x = row_offsets("w", packed, layout), torch.randn(300, 1100).bfloat16()
    own = kernels.cpu_kernels()
    if own is None or not own.takes_many(x.dtype, layout):
        pytest.skip("expanded, and multiplied by torch")
    whole = sparse_linear(x, packed, offsets, None, layout)
    parts = [sparse_linear(some, packed, offsets, None, layout) for some in x.split((8, 13, 279))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_row_without_weights_gives_its_bias(path: str, tokens: int) -> None:
    weight, grid = rounded(40, 300, 0.5, Values(4, grid="half"), torch.float32)
    empty = [0, 15, 16, 17, 39]
    weight[empty] = 0
    packed, layout = pack(weight, grid)
    x, bias = torch.randn(tokens, 300), torch.randn(40)
    y = sparse_linear(x, packed, row_offsets("w", packed, layout), bias, layout)
    assert torch.equal(y[:, empty], bias[empty].expand(tokens, -1))
    exact = x.double() @ weight.double().T + bias
    assert (y.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_not_get_lost(path: str, bad: float, tokens: int) -> None:
    weight, grid = rounded(5, 200, 0.0, Values(4), torch.float32)
    packed, layout = pack(weight, grid)
    x = torch.randn(tokens, 200)
    x[1, 70] = bad
    y = sparse_linear(x, packed, row_offsets("w", packed, layout), None, layout)
    assert y[0].isfinite().all()
    assert y[2:].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-35])
def test_next_to_nothing_gives_next_to_nothing(path: str, size: float, tokens: int) -> None:
    weight, grid = rounded(5, 200, 0.5, Values(4), torch.float32)
    packed, layout = pack(weight, grid)
    x = torch.full((tokens, 200), size)
    y = sparse_linear(x, packed, row_offsets("w", packed, layout), None, layout)
    exact = x.double() @ weight.double().T
    assert ((y.double() - exact).abs() <= 0.01 * size * weight.double().abs().sum(dim=1) + 1e-34).all()


def test_gradients_reach_the_input() -> None:
    weight, grid = rounded(9, 70, 0.5, Values(3), torch.float32)
    packed, layout = pack(weight, grid)
    x = torch.randn(3, 70, requires_grad=True)
    sparse_linear(x, packed, row_offsets("w", packed, layout), None, layout).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.sum(0).expand(3, 70), atol=1e-5)


def test_the_operators_keep_torchs_rules() -> None:
    weight, grid = rounded(9, 70, 0.5, Values(4), torch.bfloat16)
    packed, layout = pack(weight, grid)
    offsets, x = row_offsets("w", packed, layout), torch.randn(2, 3, 70, requires_grad=True)
    rest = (layout.columns, layout.dtype, 4, 64, False, layout.masked)
    torch.library.opcheck(torch.ops.secateurs.linear, (x, packed, offsets, torch.randn(9), *rest))
    torch.library.opcheck(torch.ops.secateurs.input_gradient, (torch.randn(2, 3, 9), packed, offsets, *rest))


def test_what_is_smaller_is_chosen() -> None:
    few, grid = rounded(16, 256, 0.5, Values(4), torch.bfloat16)
    none, same = rounded(16, 256, 0.0, Values(4), torch.bfloat16)
    assert layout_of(few, grid).masked
    dense = layout_of(none, same)
    assert not dense.masked
    assert dense.bytes == 16 * 256 // 2 + 16 * 4 * 2 + 64
    assert layout_of(none, same, masked=True).masked
    # Two bits behind a mask are more than two bits, unless most are gone.
    assert not layout_of(*rounded(16, 256, 0.3, Values(2), torch.bfloat16)).masked
    # Odd levels have no zero, so that there a mask it has to be.
    assert layout_of(*rounded(16, 256, 0.3, Values(2, grid="half"), torch.bfloat16)).masked


def test_what_is_off_its_grid_stays_as_it_is() -> None:
    weight, grid = rounded(4, 70, 0.5, Values(4), torch.bfloat16)
    weight[weight != 0] *= 1.01
    packed, layout = pack(weight, grid)
    assert layout.codes is None
    assert torch.equal(unpack(packed, layout), weight)


def test_experts_are_packed_alike() -> None:
    values = Values(4)
    parts = [
        rounded(8, 128, share, values, torch.bfloat16, seed) for seed, share in enumerate((0.0, 0.5, 0.9))
    ]
    weights, scales = (torch.stack(each) for each in ([w for w, _ in parts], [g[1] for _, g in parts]))
    packed, layout = pack_experts(weights, {"w": (3, 8, 128)}, (values, scales))
    assert [one.masked for one in layout.layouts] == [True] * 3
    for expert, one in enumerate(layout.layouts):
        assert torch.equal(unpack(layout.part(packed, expert), one), weights[expert])
    assert read_layout("w", layout.to_json(), 3) == layout
    weights[1] *= 1.01
    assert layout_of_experts(weights, {"w": (3, 8, 128)}, (values, scales)).codes is None


@pytest.mark.parametrize("values", KINDS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_entries_survive_json(values: Values, sparsity: float) -> None:
    _, layout = pack(*rounded(3, 70, sparsity, values, torch.float16))
    assert read_layout("layer", layout.to_json(), 3) == layout
    with pytest.raises(ValueError, match=r"'layer' has .* come with version 3"):
        read_layout("layer", layout.to_json(), 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group": 48}, "group is one of"),
        ({"group": "64"}, "another type"),
        ({"grid": "gap"}, "grid is one of"),
        ({"grid": ["half"]}, "grid|unhashable|another type"),
        ({"values": "int8", "grid": "half"}, "grid is whole"),
        ({"mask": 1}, "another type"),
        ({"mask": False}, "no mask, and codes of other than all"),
        ({"bytes": -1}, "promises -1 bytes"),
        ({"bytes": 10_000}, "promises 10000 bytes"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"values": "int5"}, "needs 'shape', 'values' and 'nonzeros', and nothing else"),
        ({"more": 1}, "nothing else"),
    ],
)
def test_an_entry_that_lies_is_refused(changed: dict[str, object], message: str) -> None:
    entry = pack(*rounded(3, 70, 0.5, Values(4), torch.float16))[1].to_json()
    with pytest.raises(ValueError, match=f"'layer'.*({message})"):
        Layout.from_json("layer", {**entry, **changed})


def test_bytes_that_lie_are_refused() -> None:
    packed, layout = pack(*rounded(3, 200, 0.5, Values(3), torch.bfloat16))
    assert layout.codes is not None
    with pytest.raises(ValueError, match="'w' should be"):
        row_offsets("w", packed[:-1], layout)
    more = packed.clone()
    more[0] ^= 1
    with pytest.raises(ValueError, match="bits in its mask"):
        row_offsets("w", more, layout)
    other = packed.clone()
    # As many bits, in other words.
    other[: layout.row_mask_bytes] = other[: layout.row_mask_bytes].view(-1, 8).flip(0).flatten()
    fewer = replace(layout, codes=Codes(Values(3), True, layout.codes.bytes - 1))
    with pytest.raises(ValueError, match=r"should be|beyond|bytes of codes by its mask"):
        row_offsets("w", other[:-1], fewer)
    infinite = packed.clone()
    scale = layout.mask_bytes + layout.value_bytes
    infinite[scale : scale + 2] = torch.tensor([float("inf")]).bfloat16().view(torch.uint8)
    with pytest.raises(ValueError, match="scales that are not finite"):
        row_offsets("w", infinite, layout)


def test_without_codes_nothing_changes() -> None:
    weight = sparse(5, 70, 0.5, torch.bfloat16)
    assert layout_of(weight) == Layout(5, 70, int((weight != 0).sum()), torch.bfloat16)
