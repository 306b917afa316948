"""SparseGPT's sweep over one block of columns, with the rows of a program on chip from start to end.

`sweep.sweep` makes several passes over the block's memory for every column; this kernel reads the block
once and writes it once. A program owns a few outputs and all columns of the block. The arithmetic is
elementwise (no `tl.dot`), so float32 is IEEE float32, and float64 works too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateurs.pattern import NM, Pattern
from secateurs.pruning.solvers.sweep import choose

TILE = 2048
"""Weights that a program holds."""


def sweep(weight: Tensor, inverse: Tensor, pattern: Pattern) -> None:
    """The same as `sweep.sweep`, up to rounding, on a contiguous `weight`."""
    assert weight.is_contiguous()
    columns, outputs = weight.shape
    if isinstance(pattern, NM):
        n, m, keep = pattern.n, pattern.m, weight  # the mask is chosen inside; no keep is read
    else:
        n, m, keep = 0, 0, choose(weight, inverse.diagonal(), pattern).to(weight.dtype).contiguous()
    width = triton.next_power_of_2(columns)
    rows = max(TILE // width, 1)
    with torch.cuda.device_of(weight):
        _sweep[(triton.cdiv(outputs, rows),)](
            weight, inverse.contiguous(), keep, outputs, columns, n, m, width, rows
        )


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    weight,  # (columns, outputs)
    inverse,  # (columns, columns)
    keep,  # (columns, outputs), 1 where a weight stays; not read where M is set
    outputs,
    columns,
    n,
    M: tl.constexpr,  # 0 for an unstructured pattern
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mine = row < outputs
    cells = column[None, :] * outputs + row[:, None]
    inside = mine[:, None] & (column < columns)[None, :]
    tile = tl.load(weight + cells, mask=inside, other=0.0)
    scale = tl.load(inverse + column * (columns + 1), mask=column < columns, other=1.0)[None, :]
    if M:
        stays = tile * 0
    for j in range(columns):
        here = (column == j)[None, :]
        if M:
            if j % M == 0:
                score = tl.abs(tile) / scale
                ahead = tile * 0
                for i in range(j, j + M):
                    rival = tl.sum(tl.where((column == i)[None, :], score, 0.0), axis=1)[:, None]
                    wins = (rival > score) | ((rival == score) & (column > i)[None, :])
                    ahead += tl.where(wins, 1.0, 0.0)
                stays = tl.where(ahead < n, 1.0, 0.0).to(tile.dtype)
            kept = tl.sum(tl.where(here, stays, 0.0), axis=1)
        else:
            kept = tl.load(keep + j * outputs + row, mask=mine, other=0.0)
        error = tl.sum(tl.where(here, tile / scale, 0.0), axis=1) * (1 - kept)
        right = (column > j) & (column < columns)
        push = tl.load(inverse + j * columns + column, mask=right, other=0.0)
        tile = tl.where(here, tile * kept[:, None], tile - error[:, None] * push[None, :])
    tl.store(weight + cells, tile, mask=inside)
