"""The codes of a matrix of few bits a weight, as they lie one after the other (docs/format.md).

A row is cut into words of 64 columns, the last one filled up. Of each word the codes that are kept follow in
order: one byte each with 8 bits; packed with 3 and 2 bits, every word from a byte on. With 4 bits words are
taken in spans of max(group, 64) columns, and the codes of even spans are the low halves of a row's bytes, those
of odd spans the high halves, both from the row's first byte on: so that a kernel has them by one `and`.

Plain numpy: the reference for the kernels.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from secateurs.values import Values

WORD = 64
"""Columns."""

AT_ONCE = 1 << 22
"""Weights that are packed at once: some bytes each meanwhile."""

Bytes = NDArray[np.uint8]
Kept = NDArray[np.bool_]


def row_bytes(kept: Kept, values: Values) -> NDArray[np.int64]:
    """(rows,) bytes of each row's codes.

    Args:
        kept: (rows, columns), columns a multiple of 64.
        values: what the codes are of.
    """
    words = _counts(kept)
    if values.bits == 4:
        return np.maximum(*(words[:, parity].sum(axis=1) for parity in _parities(words.shape[1], values)))
    return _word_bytes(words, values.bits).sum(axis=1)


def pack_codes(codes: Bytes, kept: Kept, values: Values) -> Bytes:
    """The bytes of all rows.

    Args:
        codes: (rows, columns), columns a multiple of 64.
        kept: the same, which of them are kept.
        values: what they are of.
    """
    parts = [_pack(codes[rows], kept[rows], values) for rows in _some(codes)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack_codes(packed: Bytes, kept: Kept, values: Values) -> Bytes:
    """(rows, columns) codes; 0 where nothing is kept."""
    codes = np.zeros(kept.shape, np.uint8)
    first = 0
    for rows in _some(kept):
        size = int(row_bytes(kept[rows], values).sum())
        codes[rows] = _unpack(packed[first : first + size], kept[rows], values)
        first += size
    return codes


def _some(matrix: NDArray[np.generic]) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(1, AT_ONCE // max(1, columns))
    return (slice(first, first + step) for first in range(0, rows, step))


def _pack(codes: Bytes, kept: Kept, values: Values) -> Bytes:
    if values.bits == 8:
        return codes[kept]
    if values.bits == 4:
        size, places = _halves(kept, values)
        packed = np.zeros(size, np.uint8)
        for shift, (columns, place) in zip((0, 4), places, strict=True):
            packed[place] |= codes[:, columns][kept[:, columns]] << np.uint8(shift)
        return packed
    size, first = _bits(kept, values.bits)
    bits = np.zeros(8 * size, np.uint8)
    mine = codes[kept]
    for bit in range(values.bits):
        bits[first + bit] = mine >> np.uint8(bit) & np.uint8(1)
    return np.packbits(bits, bitorder="little")


def _unpack(packed: Bytes, kept: Kept, values: Values) -> Bytes:
    codes = np.zeros(kept.shape, np.uint8)
    if values.bits == 8:
        codes[kept] = packed
    elif values.bits == 4:
        for shift, (columns, place) in zip((0, 4), _halves(kept, values)[1], strict=True):
            part = np.zeros((len(kept), len(columns)), np.uint8)
            part[kept[:, columns]] = packed[place] >> np.uint8(shift) & np.uint8(15)
            codes[:, columns] = part
    else:
        _, first = _bits(kept, values.bits)
        bits = np.unpackbits(packed, bitorder="little")
        codes[kept] = sum((bits[first + bit] << np.uint8(bit) for bit in range(values.bits)), np.uint8(0))
    return codes


def _counts(kept: Kept) -> NDArray[np.int64]:
    """(rows, words): codes that each word keeps."""
    return kept.reshape(len(kept), -1, WORD).sum(axis=2, dtype=np.int64)


def _word_bytes(counts: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    return (counts * bits + 7) // 8


def _parities(words: int, values: Values) -> list[Kept]:
    """Which words are of even spans, and which are of odd ones."""
    odd = np.arange(words) // (max(values.group, WORD) // WORD) % 2 == 1
    return [~odd, odd]


def _halves(kept: Kept, values: Values) -> tuple[int, list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """How many bytes there are; of even and of odd spans the columns, and the bytes of what they keep."""
    sizes = row_bytes(kept, values)
    begins = np.cumsum(sizes) - sizes
    places = []
    for parity in _parities(kept.shape[1] // WORD, values):
        columns = np.flatnonzero(np.repeat(parity, WORD))
        mine = kept[:, columns]
        within = np.cumsum(mine, axis=1, dtype=np.int64) - 1
        places.append((columns, (begins[:, None] + within)[mine]))
    return int(sizes.sum()), places


def _bits(kept: Kept, bits: int) -> tuple[int, NDArray[np.int64]]:
    """How many bytes there are; and the first bit of each code that is kept."""
    sizes = _word_bytes(_counts(kept), bits)
    begins = np.cumsum(sizes).reshape(sizes.shape) - sizes
    by_word = kept.reshape(len(kept), -1, WORD)
    within = np.cumsum(by_word, axis=2, dtype=np.int64) - 1
    return int(sizes.sum()), (8 * begins[:, :, None] + bits * within)[by_word]
