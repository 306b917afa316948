"""The codes of a matrix of few bits a weight, as they lie one after the other (docs/format.md).

A row is cut into words of 64 columns, the last one filled up. Of each word the codes that are kept follow in
order: one byte each with 8 bits; packed with 3 and 2 bits, every word from a byte on. With 4 bits words are
taken in spans of max(group, 64) columns, and the codes of even spans are the low halves of a row's bytes,
those of odd spans the high halves, both from the row's first byte on: a kernel has them by one `and`.

Plain torch, on any device: the reference for the kernels, and the path for machines without one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from secateurs.values import Values

WORD = 64
"""Columns."""

AT_ONCE = 1 << 22
"""Weights that are packed at once: some tens of bytes each meanwhile."""


def word_counts(kept: Tensor) -> Tensor:
    """(rows, words) int64, how many of each word's 64 columns are kept; of (rows, columns) bool."""
    return kept.unflatten(1, (-1, WORD)).sum(dim=2)


def row_bytes(counts: Tensor, values: Values) -> Tensor:
    """(rows,) int64, bytes of each row's codes.

    Args:
        counts: (rows, words) int64, codes that each word keeps.
        values: what the codes are of.
    """
    if values.bits == 4:
        low, high = (counts[:, words].sum(dim=1) for words in _spans(counts.shape[1], values))
        return torch.maximum(low, high)
    return _word_bytes(counts, values.bits).sum(dim=1)


def pack_codes(codes: Tensor, kept: Tensor, values: Values) -> Tensor:
    """The bytes of all rows, uint8.

    Args:
        codes: (rows, columns) uint8, columns a multiple of 64.
        kept: (rows, columns) bool, which of them are kept.
        values: what they are of.
    """
    return torch.cat([_pack(codes[rows], kept[rows], values) for rows in _some(kept)])


def unpack_codes(packed: Tensor, kept: Tensor, values: Values) -> Tensor:
    """(rows, columns) uint8 codes; 0 where nothing is kept."""
    codes = torch.zeros(kept.shape, dtype=torch.uint8, device=packed.device)
    first = 0
    for rows in _some(kept):
        size = int(row_bytes(word_counts(kept[rows]), values).sum())
        codes[rows] = _unpack(packed[first : first + size], kept[rows], values)
        first += size
    return codes


def _some(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(1, AT_ONCE // columns)
    return (slice(first, first + step) for first in range(0, rows, step))


def _pack(codes: Tensor, kept: Tensor, values: Values) -> Tensor:
    if values.bits == 8:
        return codes[kept]
    if values.bits == 4:
        size, halves = _halves(kept, values)
        packed = codes.new_zeros(size)
        for shift, (columns, place) in zip((0, 4), halves, strict=True):
            packed[place] |= codes[:, columns][kept[:, columns]] << shift
        return packed
    size, first = _bits(kept, values.bits)
    wide = codes[kept].int() << first % 8
    # Bits of different codes never meet, so that adding is putting them side by side.
    packed = wide.new_zeros(size + 1).index_add_(0, first // 8, wide & 255)
    return packed.index_add_(0, first // 8 + 1, wide >> 8)[:size].to(torch.uint8)


def _unpack(packed: Tensor, kept: Tensor, values: Values) -> Tensor:
    codes = torch.zeros(kept.shape, dtype=torch.uint8, device=packed.device)
    if values.bits == 8:
        return codes.masked_scatter_(kept, packed)
    if values.bits == 4:
        for shift, (columns, place) in zip((0, 4), _halves(kept, values)[1], strict=True):
            part = codes[:, columns]
            codes[:, columns] = part.masked_scatter_(kept[:, columns], packed[place] >> shift & 15)
        return codes
    _, first = _bits(kept, values.bits)
    wide = torch.nn.functional.pad(packed, (0, 1)).int()
    mine = (wide[first // 8] | wide[first // 8 + 1] << 8) >> first % 8 & (1 << values.bits) - 1
    return codes.masked_scatter_(kept, mine.to(torch.uint8))


def _word_bytes(counts: Tensor, bits: int) -> Tensor:
    return (counts * bits + 7) // 8


def _spans(words: int, values: Values) -> tuple[Tensor, Tensor]:
    """Which words are of even spans, and which are of odd ones."""
    odd = torch.arange(words) // (max(values.group, WORD) // WORD) % 2 == 1
    return ~odd, odd


def _halves(kept: Tensor, values: Values) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """How many bytes there are; of even and of odd spans the columns, and the bytes of what they keep."""
    sizes = row_bytes(word_counts(kept), values)
    begins = sizes.cumsum(0) - sizes
    halves = []
    for words in _spans(kept.shape[1] // WORD, values):
        columns = words.repeat_interleave(WORD).nonzero().flatten().to(kept.device)
        mine = kept[:, columns]
        halves.append((columns, (begins[:, None] + mine.cumsum(dim=1) - 1)[mine]))
    return int(sizes.sum()), halves


def _bits(kept: Tensor, bits: int) -> tuple[int, Tensor]:
    """How many bytes there are; and the first bit of each code that is kept."""
    sizes = _word_bytes(word_counts(kept), bits)
    begins = sizes.flatten().cumsum(0).view_as(sizes) - sizes
    words = kept.unflatten(1, (-1, WORD))
    return int(sizes.sum()), (8 * begins[..., None] + bits * (words.cumsum(dim=2) - 1))[words]
