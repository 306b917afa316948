"""Parts of packed weights, and packed weights in one, against slices and sums of the dense matrices."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import sparse
from torch import Tensor

from secateurs.runtime.format import layout_of, layout_of_experts, pack, row_offsets, unpack
from secateurs.runtime.kernels import sparse_linear
from secateurs.runtime.layout import Layout
from secateurs.runtime.shards import join_rows, share, take_columns, take_rows, without_experts
from secateurs.values import Values

FORMS = [
    None,
    Values(8, 64),
    Values(4, 32),
    Values(4, 128),
    Values(4, 64, "half"),
    Values(3, 64),
    Values(2, 128, "half"),
]
forms = st.sampled_from(FORMS)
shares = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def packed_weight(
    rows: int, columns: int, sparsity: float, values: Values | None, seed: int
) -> tuple[Tensor, Tensor, Layout]:
    """A matrix, its packed bytes and their layout; on a grid where there is one."""
    weight = sparse(rows, columns, sparsity, torch.bfloat16, seed)
    if values is None:
        return weight, *pack(weight)
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(rows, values.groups(columns), generator=generator).add_(0.5).bfloat16()
    weight = values.decode(values.encode(weight, scales), scales).bfloat16() * (weight != 0)
    packed, layout = pack(weight, (values, scales))
    assert layout.codes is not None
    return weight, packed, layout


def assert_is(packed: Tensor, layout: Layout, weight: Tensor) -> None:
    """It is this matrix, and passes the gate that files pass."""
    row_offsets("w", packed, layout)
    assert torch.equal(unpack(packed, layout), weight)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 24), st.integers(1, 300), shares, forms, st.integers(0, 100), st.data())
def test_rows_of_a_packed_weight_are_those_of_the_dense_one(
    rows: int, columns: int, sparsity: float, values: Values | None, seed: int, data: st.DataObject
) -> None:
    weight, packed, layout = packed_weight(rows, columns, sparsity, values, seed)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    part, own = take_rows(packed, row_offsets("w", packed, layout), layout, first, last)
    assert_is(part, own, weight[first:last])
    assert own.codes is None or (layout.codes and own.codes.values == layout.codes.values)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 24), st.integers(1, 10), shares, forms, st.integers(0, 100), st.integers(1, 4))
def test_columns_of_a_packed_weight_are_those_of_the_dense_one(
    rows: int, width: int, sparsity: float, values: Values | None, seed: int, ranks: int
) -> None:
    width *= 31 if seed % 3 == 0 else 32
    weight, packed, layout = packed_weight(rows, ranks * width, sparsity, values, seed)
    offsets = row_offsets("w", packed, layout)
    for rank in range(ranks):
        first, last = rank * width, (rank + 1) * width
        part, own = take_columns(packed, offsets, layout, first, last)
        assert_is(part, own, weight[:, first:last])
        # Codes stay codes wherever a group of 32 can begin.
        assert (own.codes is not None) == (values is not None and first % 32 == 0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.integers(1, 9), shares, forms, st.integers(0, 100)), min_size=1, max_size=4),
)
def test_weights_below_each_other_are_joined_where_they_are_of_one_kind(
    columns: int, wanted: list[tuple[int, float, Values | None, int]]
) -> None:
    made = [packed_weight(rows, columns, *rest) for rows, *rest in wanted]
    joined = join_rows([(packed, layout) for _, packed, layout in made])
    dense = torch.cat([weight for weight, _, _ in made])
    assert torch.equal(torch.cat([unpack(*each) for each in joined]), dense)
    for packed, layout in joined:
        row_offsets("w", packed, layout)
    kinds = [(layout.masked, layout.codes and layout.codes.values) for _, _, layout in made]
    changes = sum(kind != before for before, kind in pairwise(kinds))
    assert len(joined) == 1 + changes


@pytest.mark.parametrize("values", FORMS)
@pytest.mark.parametrize("tokens", [1, 200])
def test_ranks_together_multiply_as_one(values: Values | None, tokens: int) -> None:
    torch.manual_seed(0)
    weight, packed, layout = packed_weight(48, 256, 0.5, values, 1)
    offsets = row_offsets("w", packed, layout)
    x = torch.randn(tokens, 256)
    whole = sparse_linear(x, packed, offsets, None, layout)

    def product(x: Tensor, part: Tensor, own: Layout) -> Tensor:
        return sparse_linear(x, part, row_offsets("w", part, own), None, own)

    rows = [product(x, *take_rows(packed, offsets, layout, first, first + 16)) for first in (0, 16, 32)]
    torch.testing.assert_close(torch.cat(rows, dim=-1), whole)
    cuts = [(first, first + 64) for first in range(0, 256, 64)]
    sums = [product(x[:, a:b], *take_columns(packed, offsets, layout, a, b)) for a, b in cuts]
    if values is None:
        torch.testing.assert_close(sum(sums), whole, atol=1e-4, rtol=1e-5)
        return
    # Tokens may be rounded to eight bits, and groups may have become shorter: half a step each.
    steps = x.abs().unflatten(1, (-1, values.group)).amax(2).repeat_interleave(values.group, 1) / 127
    assert ((sum(sums) - whole).abs() <= steps @ weight.float().abs().T + 1e-4).all()


def test_more_weights_than_fit_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateurs.runtime.shards.MOST_WEIGHTS", 4 * 64)
    weight = sparse(3, 50, 0.5, torch.bfloat16)
    joined = join_rows([pack(weight), pack(weight), pack(weight[:1])])
    assert [layout.rows for _, layout in joined] == [3, 4]
    assert replace(joined[0][1], rows=1, nonzeros=0) == replace(joined[1][1], rows=1, nonzeros=0)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_share_out_all_rows_and_neighbours_the_same_heads(ranks: int) -> None:
    # Eight heads of 4 rows that ask, two that are asked, of 4 and of 3 rows.
    kept = max(2 // ranks, 1)
    own = [32 // ranks, 4 * kept, 3 * kept]
    heads = [share("w", [32, 8, 6], own, rank, ranks) for rank in range(ranks)]
    assert [first for each in heads for first in range(*each[0])] == list(range(32))
    for part, (begin, size) in enumerate([(32, 4), (40, 3)], start=1):
        for rank, each in enumerate(heads):
            # A rank's queries are asked of the head that their number says.
            asked = rank * 2 // ranks
            assert each[part] == (begin + asked * size, begin + (asked + kept) * size)


def test_every_rank_has_all_of_a_replicated_layer() -> None:
    assert [share("w", [5], [5], rank, 3) for rank in range(3)] == [[(0, 5)]] * 3


@pytest.mark.parametrize(("whole", "own", "ranks"), [(10, 4, 2), (9, 3, 2), (4, 8, 2)])
def test_what_cannot_be_shared_out_is_refused(whole: int, own: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=rf"^{whole} rows or columns of 'w' do not make {own} for each of"):
        share("w", [whole], [own], 0, ranks)


def test_experts_are_refused_by_name() -> None:
    weight = sparse(2, 64, 0.5, torch.bfloat16)
    layers = {"a.up": layout_of(weight), "b.experts.up": layout_of_experts(weight[None], {})}
    with pytest.raises(ValueError, match=r"^packed experts, such as 'b.experts.up', .*secateurs decompress"):
        without_experts(layers)
    del layers["b.experts.up"]
    assert without_experts(layers) == layers
