"""Parts of packed weights, and packed weights in one: for engines that fuse layers and share them out.

Rows lie one after the other, so that taking and joining them is copying bytes. Where columns are cut, values
and codes begin elsewhere: those are unpacked and packed again, and come back exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd, prod
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from secateurs.runtime.format import Grid, pack, scales_of
from secateurs.runtime.kernels import expand
from secateurs.runtime.layout import MOST_WEIGHTS, TAIL_BYTES, ExpertsLayout, Layout, padded
from secateurs.values import Group

Packed = tuple[Tensor, Layout]
"""The bytes of a packed weight, (layout.bytes,) uint8 on the CPU, and their layout."""


def without_experts(layers: Mapping[str, Layout | ExpertsLayout]) -> dict[str, Layout]:
    """The same layers.

    Raises:
        ValueError: some are experts.
    """
    linear = {}
    for name, layout in layers.items():
        if isinstance(layout, ExpertsLayout):
            raise ValueError(
                f"packed experts, such as '{name}', run in transformers only: write the dense folder with "
                "`secateurs decompress`, and load that"
            )
        linear[name] = layout
    return linear


def share(
    name: str, whole: Sequence[int], own: Sequence[int], rank: int, ranks: int
) -> list[tuple[int, int]]:
    """The rows (or columns) that a rank has of matrices below (or beside) each other.

    Args:
        name: of the weight, for the error.
        whole: how many each matrix has.
        own: how many of them each rank has. Where that is more than its share, as of few key and value heads,
            neighbouring ranks have the same; where it is all, all ranks have all.
        rank: which, of `ranks`.
        ranks: how many there are.

    Returns:
        First and last + 1 of each matrix.

    Raises:
        ValueError: they cannot be shared out so.
    """
    taken, begin = [], 0
    for of_all, mine in zip(whole, own, strict=True):
        parts, rest = divmod(of_all, mine)
        if rest or ranks % max(parts, 1):
            raise ValueError(
                f"{of_all} rows or columns of '{name}' do not make {mine} for each of {ranks} ranks"
            )
        first = begin + rank * parts // ranks * mine
        taken.append((first, first + mine))
        begin += of_all
    return taken


def take_rows(packed: Tensor, offsets: Tensor, layout: Layout, first: int, last: int) -> Packed:
    """Rows [first, last) of a packed weight whose `row_offsets` are these."""
    size = layout.dtype.itemsize if layout.codes is None else 1
    begin, end = (int(offsets[row]) * size for row in (first, last))
    mask, values, scales = _sections(packed, layout)
    mask = mask.view(layout.rows, -1)[first:last].flatten()
    scales = scales.view(layout.rows, -1)[first:last].flatten()
    part = replace(layout, rows=last - first)
    if layout.codes is not None:
        part = replace(part, codes=replace(layout.codes, bytes=end - begin))
    kept = int(np.bitwise_count(mask.numpy()).sum(dtype=np.int64)) if layout.masked else prod(part.shape)
    return _joined([mask, values[begin:end], scales]), replace(part, nonzeros=kept)


def take_columns(packed: Tensor, offsets: Tensor, layout: Layout, first: int, last: int) -> Packed:
    """Columns [first, last) of a packed weight whose `row_offsets` are these.

    Where they begin inside a group of codes, groups become shorter (64 columns, or 32). Where they begin at
    no multiple of 32, codes become values of the weight's dtype.
    """
    weight = expand(packed, offsets, layout, 0, layout.rows)[:, first:last].contiguous()
    grid: Grid | None = None
    if layout.codes is not None:
        values = layout.codes.values
        group: Any = gcd(values.group, first)
        if group in get_args(Group):
            scales = values.spread(scales_of(packed, layout), layout.columns)[:, first:last:group]
            grid = replace(values, group=group), scales.clone(memory_format=torch.contiguous_format)
    return pack(weight, grid)


def join_rows(parts: Sequence[Packed]) -> list[Packed]:
    """The weights below each other, in as few packed ones as there can be: neighbours become one where their
    values are of one kind, and all or none are behind masks."""
    joined: list[list[Packed]] = []
    for packed, layout in parts:
        if joined:
            rows = layout.rows + sum(each.rows for _, each in joined[-1])
            if _kind(layout) == _kind(joined[-1][0][1]) and rows * padded(layout.columns) <= MOST_WEIGHTS:
                joined[-1].append((packed, layout))
                continue
        joined.append([(packed, layout)])
    return [_below(group) if len(group) > 1 else group[0] for group in joined]


def _below(parts: list[Packed]) -> Packed:
    layouts = [layout for _, layout in parts]
    whole = replace(
        layouts[0],
        rows=sum(layout.rows for layout in layouts),
        nonzeros=sum(layout.nonzeros for layout in layouts),
    )
    if whole.codes is not None:
        size = sum(layout.value_bytes for layout in layouts)
        whole = replace(whole, codes=replace(whole.codes, bytes=size))
    sections = zip(*(_sections(packed, layout) for packed, layout in parts), strict=True)
    return _joined([piece for section in sections for piece in section]), whole


def _kind(layout: Layout) -> tuple[object, ...]:
    """What rows must have in common to be of one packed weight."""
    values = None if layout.codes is None else layout.codes.values
    return layout.columns, layout.dtype, layout.masked, values


def _sections(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, values and scales: views, empty where there are none."""
    sizes = [layout.mask_bytes, layout.value_bytes, layout.scale_bytes, TAIL_BYTES]
    mask, values, scales, _ = packed.split(sizes)
    return mask, values, scales


def _joined(sections: list[Tensor]) -> Tensor:
    return torch.cat([*sections, torch.zeros(TAIL_BYTES, dtype=torch.uint8)])
