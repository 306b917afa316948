"""Products with packed weights on a GPU, in Triton, from the same format as the CPU's.

A program keeps a few rows. It walks their columns a block at a time: the mask's bits, a running count of
them (where each value lies), a load of only the values that exist, and the product; a token never waits for a
dense weight to be written. Up to 16 tokens share one pass, through the tensor cores. Codes of a few bits are
found in the same way (docs/format.md); activations stay as they are, where the CPU's kernels round them.

One token and values as they are have a kernel of their own, which counts bits by words (docs/runtime.md says
what that costs). It has been compiled and interpreted, but not run on a card.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateurs.runtime.format import codes_of, mask_of, values_of
from secateurs.runtime.layout import Layout

DIRECT_TOKENS = 16


class Tile(NamedTuple):
    """What a program works on at a time; benchmarks/decode_gpu.py tries several."""

    rows: int
    columns: int
    warps: int
    stages: int = 1
    """How many blocks of columns are under way at once: their masks are fetched ahead."""


VECTOR = Tile(4, 256, 1)
"""For one token."""

ALONE = Tile(1, 2048, 4)
"""For one token, where values are codes."""

TOGETHER = Tile(16, 256, 4)
"""For more; the tensor cores' smallest tile has 16 rows."""

TOGETHER_FLOAT32 = Tile(16, 64, 4)
"""For more, without tensor cores: what is multiplied stays in registers, where no more has room."""

EXPANSION = Tile(1, 2048, 4)

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# What the tensor cores multiply; Triton's interpreter has no bfloat16 there.
FACTORS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
}


@triton.jit
def _expand_block(  # type: ignore[no-untyped-def]
    mask,
    values,
    scales,
    row,
    inside,
    low,
    high,
    start,
    columns,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LOWEST: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns [start, start + BLOCK) of the given rows, dense; and where the values after them begin.

    Values, or bytes of codes, follow each other from `low` on. But codes of 4 bits of even spans are the low
    halves of the bytes from `low` on, and those of odd spans the high halves from `high` on.
    """
    column = start + tl.arange(0, BLOCK)
    known = inside[:, None] & (column < columns)[None, :]
    row_words = (columns + 63) // 64 * 2
    if MASKED:
        word = tl.load(mask + row[:, None] * row_words + column[None, :] // 32, mask=known, other=0)
        bit = (word >> (column % 32)[None, :]) & 1
    else:  # a row is filled up with codes
        bit = (inside[:, None] & (column < row_words * 32)[None, :]).to(tl.int32)
    if BITS == 0:
        rank = tl.cumsum(bit, axis=1)
        weight = tl.load(values + low[:, None] + rank - bit, mask=bit == 1, other=0.0)
        low += tl.sum(bit, axis=1)
    else:
        if BITS == 4:
            odd = (column // (GROUP if GROUP > 64 else 64) % 2)[None, :]
            evens, odds = bit * (1 - odd), bit * odd
            rank = tl.where(odd == 1, tl.cumsum(odds, axis=1), tl.cumsum(evens, axis=1)) - bit
            place = tl.where(odd == 1, high[:, None], low[:, None]) + rank
            code = tl.load(values + place, mask=bit == 1, other=0).to(tl.int32) >> (4 * odd) & 15
            low += tl.sum(evens, axis=1)
            high += tl.sum(odds, axis=1)
        else:
            kept = tl.reshape(bit, (ROWS, BLOCK // 64, 64))
            size = (tl.sum(kept, axis=2) * BITS + 7) // 8
            first = low[:, None] + tl.cumsum(size, axis=1) - size
            begin = (tl.cumsum(kept, axis=2) - kept) * BITS
            place = tl.reshape(first[:, :, None] + begin // 8, (ROWS, BLOCK))
            code = tl.load(values + place, mask=bit == 1, other=0).to(tl.int32)
            if BITS != 8:
                code |= tl.load(values + place + 1, mask=bit == 1, other=0).to(tl.int32) << 8
                code = code >> tl.reshape(begin % 8, (ROWS, BLOCK)) & ((1 << BITS) - 1)
            low += tl.sum(size, axis=1)
        groups = (columns + GROUP - 1) // GROUP
        scale = scales + 2 * (row[:, None] * groups + column[None, :] // GROUP)
        wide = tl.load(scale, mask=known, other=0).to(tl.int32) << 16  # bfloat16 that is not aligned
        wide |= tl.load(scale + 1, mask=known, other=0).to(tl.int32) << 24
        level = code * STEP + LOWEST
        weight = level.to(tl.float32) * wide.to(tl.float32, bitcast=True)
        weight = tl.where(known & (bit == 1) & (level != 0), weight, 0.0).to(DTYPE)
    return weight, low, high


@triton.jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    x,
    mask,
    values,
    scales,
    offsets,
    bias,
    y,
    tokens,
    rows,
    columns,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LOWEST: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
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
    low = tl.load(offsets + row, mask=inside, other=0)
    high = low
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        weight, low, high = _expand_block(
            mask,
            values,
            scales,
            row,
            inside,
            low,
            high,
            start,
            columns,
            BITS,
            GROUP,
            LOWEST,
            STEP,
            MASKED,
            DTYPE,
            ROWS,
            BLOCK,
        )
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
def _popcount(word):  # type: ignore[no-untyped-def]
    """Bits that are set in each int32: an instruction, of which LLVM knows this form."""
    bits = word.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _vector_kernel(  # type: ignore[no-untyped-def]
    x,
    mask,
    values,
    offsets,
    bias,
    y,
    rows,
    columns,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One token. A lane has a column of each word of the mask: where its value lies is the word's start plus
    the bits below its own, so that a warp reads values that follow each other, and nothing is added up over
    columns but at the end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lane = tl.arange(0, 32)
    below = ~((tl.zeros((32,), dtype=tl.int32) - 1) << lane)
    row_words = (columns + 63) // 64 * 2
    low = tl.load(offsets + row, mask=inside, other=0)
    total = tl.zeros((ROWS, WORDS, 32), dtype=tl.float32)
    for start in tl.range(0, row_words, WORDS, num_stages=STAGES):
        at = start + tl.arange(0, WORDS)
        known = inside[:, None] & (at < row_words)[None, :]
        word = tl.load(mask + row[:, None] * row_words + at[None, :], mask=known, other=0)
        count = _popcount(word)
        first = low[:, None] + tl.cumsum(count, axis=1) - count
        low += tl.sum(count, axis=1)
        place = first[:, :, None] + _popcount(word[:, :, None] & below[None, None, :])
        kept = (word[:, :, None] >> lane[None, None, :]) & 1 == 1
        weight = tl.load(values + place, mask=kept, other=0.0)
        column = at[:, None] * 32 + lane[None, :]
        part = tl.load(x + column, mask=column < columns, other=0.0)
        total += weight.to(tl.float32) * part.to(tl.float32)[None, :, :]
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _expand_kernel(  # type: ignore[no-untyped-def]
    mask,
    values,
    scales,
    offsets,
    dense,
    first,
    last,
    columns,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LOWEST: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < last
    low = tl.load(offsets + row, mask=inside, other=0)
    high = low
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        weight, low, high = _expand_block(
            mask,
            values,
            scales,
            row,
            inside,
            low,
            high,
            start,
            columns,
            BITS,
            GROUP,
            LOWEST,
            STEP,
            MASKED,
            DTYPE,
            ROWS,
            BLOCK,
        )
        column = start + tl.arange(0, BLOCK)
        place = (row - first).to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(dense + place, weight, mask=inside[:, None] & (column < columns)[None, :])


class _Packed(NamedTuple):
    """A packed weight as the kernels take it."""

    mask: Tensor
    """int32; anything without one."""
    values: Tensor
    scales: Tensor
    """uint8; anything where values are not codes."""
    form: dict[str, Any]


def _packed(weight: Tensor, layout: Layout) -> _Packed:
    mask = mask_of(weight, layout).view(torch.int32) if layout.masked else weight
    dtype = DTYPES[layout.dtype]
    if layout.codes is None:
        form = {"BITS": 0, "GROUP": 64, "LOWEST": 0, "STEP": 1, "MASKED": True, "DTYPE": dtype}
        return _Packed(mask, values_of(weight, layout), weight, form)
    values = layout.codes.values
    form = {"BITS": values.bits, "GROUP": values.group, "LOWEST": values.lowest, "STEP": values.step}
    form |= {"MASKED": layout.masked, "DTYPE": dtype}
    codes = codes_of(weight, layout)
    return _Packed(mask, codes, weight[layout.mask_bytes + layout.value_bytes :], form)


def linear(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """x W^T + bias, straight from the packed weight.

    Args:
        x: (tokens, columns), at most DIRECT_TOKENS of them.
        weight: (layout.bytes,) uint8.
        offsets: (rows + 1,) int32.
        bias: (rows,) or None.
        layout: of the weight.

    Returns:
        (tokens, rows) in x's dtype; sums in float32.
    """
    tokens, columns = x.shape
    assert tokens <= DIRECT_TOKENS
    packed, y = _packed(weight, layout), x.new_empty(tokens, layout.rows)
    alone = tokens == 1
    if alone and layout.codes is None:
        with torch.cuda.device_of(x):
            _vector_kernel[(triton.cdiv(layout.rows, VECTOR.rows),)](
                x.contiguous(),
                packed.mask,
                packed.values,
                offsets,
                packed.values if bias is None else bias,
                y,
                layout.rows,
                columns,
                HAS_BIAS=bias is not None,
                ROWS=VECTOR.rows,
                WORDS=VECTOR.columns // 32,
                STAGES=VECTOR.stages,
                num_warps=VECTOR.warps,
            )
        return y
    factor = FACTORS[x.dtype] if x.dtype == layout.dtype else tl.float32
    tile = ALONE if alone else TOGETHER_FLOAT32 if factor == tl.float32 else TOGETHER
    with torch.cuda.device_of(x):
        _linear_kernel[(triton.cdiv(layout.rows, tile.rows),)](
            x.contiguous(),
            packed.mask,
            packed.values,
            packed.scales,
            offsets,
            packed.values if bias is None else bias,
            y,
            tokens,
            layout.rows,
            columns,
            **packed.form,
            HAS_BIAS=bias is not None,
            FACTOR=factor,
            TOKENS=1 if alone else 16,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return y


def expand(weight: Tensor, offsets: Tensor, layout: Layout, first: int, last: int) -> Tensor:
    """Rows [first, last) of a packed weight, dense, in the layout's dtype."""
    packed = _packed(weight, layout)
    dense = torch.empty(last - first, layout.columns, dtype=layout.dtype, device=weight.device)
    tile = EXPANSION
    with torch.cuda.device_of(weight):
        _expand_kernel[(triton.cdiv(last - first, tile.rows),)](
            packed.mask,
            packed.values,
            packed.scales,
            offsets,
            dense,
            first,
            last,
            layout.columns,
            **packed.form,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return dense
