"""Products with packed weights on a GPU, in Triton, from the same format as the CPU's.

A program keeps a few rows. It walks their columns a block at a time: the mask's bits, a running count of
them (where each value lies), a load of only the values that exist, and the product; a token never waits for a
dense weight to be written. Up to 16 tokens share one pass, through the tensor cores.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DIRECT_TOKENS = 16


class Tile(NamedTuple):
    """What a program works on at a time; benchmarks/decode_gpu.py tries several."""

    rows: int
    columns: int
    warps: int
    stages: int = 1
    """How many blocks of columns are under way at once: their masks are fetched ahead."""


ALONE = Tile(1, 2048, 4)
"""For one token."""

TOGETHER = Tile(16, 256, 4)
"""For more; the tensor cores' smallest tile has 16 rows."""

TOGETHER_FLOAT32 = Tile(16, 64, 4)
"""For more, without tensor cores: what is multiplied stays in registers, where no more has room."""

EXPANSION = Tile(1, 2048, 4)

# What the tensor cores multiply; Triton's interpreter has no bfloat16 there.
FACTORS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
}


@triton.jit
def _expand_block(  # type: ignore[no-untyped-def]
    mask, values, row, inside, begin, start, columns, row_words, BLOCK: tl.constexpr
):
    """Columns [start, start + BLOCK) of the given rows, dense, and how many values they hold."""
    column = start + tl.arange(0, BLOCK)
    wanted = inside[:, None] & (column < columns)[None, :]
    word = tl.load(mask + row[:, None] * row_words + column[None, :] // 32, mask=wanted, other=0)
    bit = (word >> (column % 32)[None, :]) & 1
    rank = tl.cumsum(bit, axis=1)
    weight = tl.load(values + begin[:, None] + rank - bit, mask=bit == 1, other=0.0)
    return weight, tl.sum(bit, axis=1)


@triton.jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    x,
    mask,
    values,
    offsets,
    bias,
    y,
    tokens,
    rows,
    columns,
    row_words,
    HAS_BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS).to(tl.int64)
    inside = row < rows
    begin = tl.load(offsets + row, mask=inside, other=0)
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        weight, count = _expand_block(mask, values, row, inside, begin, start, columns, row_words, BLOCK)
        begin += count
        column = start + tl.arange(0, BLOCK)
        wanted = (token < tokens)[:, None] & (column < columns)[None, :]
        part = tl.load(x + token[:, None] * columns + column[None, :], mask=wanted, other=0.0)
        if TOKENS == 1:
            total += tl.sum(weight.to(tl.float32) * part.to(tl.float32), axis=1)[:, None]
        else:
            total = tl.dot(weight.to(FACTOR), tl.trans(part.to(FACTOR)), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    wanted = inside[:, None] & (token < tokens)[None, :]
    tl.store(y + token[None, :] * rows + row[:, None], total.to(y.dtype.element_ty), mask=wanted)


@triton.jit
def _expand_kernel(  # type: ignore[no-untyped-def]
    mask,
    values,
    offsets,
    dense,
    first,
    last,
    columns,
    row_words,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < last
    begin = tl.load(offsets + row, mask=inside, other=0)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        weight, count = _expand_block(mask, values, row, inside, begin, start, columns, row_words, BLOCK)
        begin += count
        column = start + tl.arange(0, BLOCK)
        place = (row - first).to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(dense + place, weight, mask=inside[:, None] & (column < columns)[None, :])


def linear(x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, straight from the packed weight.

    Args:
        x: (tokens, columns), at most DIRECT_TOKENS of them.
        mask: (rows, row_mask_bytes) uint8.
        values: (nonzeros,).
        offsets: (rows + 1,) int32.
        bias: (rows,) or None.

    Returns:
        (tokens, rows) in x's dtype; sums in float32.
    """
    tokens, columns = x.shape
    assert tokens <= DIRECT_TOKENS
    y = x.new_empty(tokens, len(mask))
    alone = tokens == 1
    factor = FACTORS[x.dtype] if x.dtype == values.dtype else tl.float32
    tile = ALONE if alone else TOGETHER_FLOAT32 if factor == tl.float32 else TOGETHER
    with torch.cuda.device_of(x):
        _linear_kernel[(triton.cdiv(len(mask), tile.rows),)](
            x.contiguous(),
            mask.view(torch.int32),
            values,
            offsets,
            values if bias is None else bias,
            y,
            tokens,
            len(mask),
            columns,
            mask.shape[1] // 4,
            HAS_BIAS=bias is not None,
            FACTOR=factor,
            TOKENS=1 if alone else 16,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return y


def expand(mask: Tensor, values: Tensor, offsets: Tensor, columns: int, first: int, last: int) -> Tensor:
    """Rows [first, last) of a packed weight, dense, in the values' dtype."""
    dense = values.new_empty(last - first, columns)
    tile, words = EXPANSION, mask.view(torch.int32)
    with torch.cuda.device_of(values):
        _expand_kernel[(triton.cdiv(last - first, tile.rows),)](
            words,
            values,
            offsets,
            dense,
            first,
            last,
            columns,
            words.shape[1],
            ROWS=tile.rows,
            BLOCK=tile.columns,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return dense
