"""The compressed form of one weight: a bitmask, then the packed non-zeros, in one flat tensor of bytes.

A decoder reads every weight for every token, so what counts is bytes: `(1 - s) * b + 1/8` per weight at
sparsity s with values of b bytes. Values may also be codes of a few bits, with scales behind them, and then
the mask may be missing. There are no stored offsets that a file could lie about: where a row begins follows
from the mask's bits, counted once when the weight is loaded, and compared with the promised length. The
layout is documented in docs/format.md.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from secateurs.runtime.codes import pack_codes, row_bytes, unpack_codes, word_counts
from secateurs.runtime.layout import (
    DTYPES,
    MOST_WEIGHTS,
    Codes,
    ExpertsLayout,
    Layout,
    bytes_of_all,
    expert_name,
    padded,
)
from secateurs.values import Values

Grid = tuple[Values, torch.Tensor]
"""What a weight was rounded to: the grid, and scales (rows, groups) or (experts, rows, groups)."""


def pack_experts(
    weights: torch.Tensor, stored: Mapping[str, tuple[int, ...]], grid: Grid | None = None
) -> tuple[torch.Tensor, ExpertsLayout]:
    """Packs the matrices of all experts, (experts, rows, columns); see `ExpertsLayout` and `pack`."""
    layout = layout_of_experts(weights, stored, grid)
    packed = torch.zeros(layout.bytes, dtype=torch.uint8)
    for expert, (weight, own) in enumerate(zip(weights, layout.layouts, strict=True)):
        layout.part(packed, expert).copy_(_pack(weight, own, None if grid is None else grid[1][expert]))
    return packed, layout


def layout_of_experts(
    weights: torch.Tensor, stored: Mapping[str, tuple[int, ...]], grid: Grid | None = None
) -> ExpertsLayout:
    """Of the matrices of all experts once they are packed; see `layout_of`. All are packed in the same way:
    one that was not rounded keeps the others from being codes.
    """
    if grid is not None:
        values, scales = grid
        for masked in (False, True):
            layouts = [layout_of(w, (values, s), masked=masked) for w, s in zip(weights, scales, strict=True)]
            if all(one.codes is not None and one.masked == layouts[0].masked for one in layouts):
                return ExpertsLayout(tuple(layouts), stored)
    return ExpertsLayout(tuple(map(layout_of, weights)), stored)


def layout_of(weight: torch.Tensor, grid: Grid | None = None, *, masked: bool = False) -> Layout:
    """Of a weight (rows, columns) once it is packed, so that it comes back exactly: where it is on a grid, as
    codes, with a mask or without one, whichever takes fewer bytes.

    Args:
        weight: float32, bfloat16 or float16, on any device. Both zeros count as zero.
        grid: that it was rounded to. If it lies elsewhere now, its values stay as they are.
        masked: have a mask, whatever it costs.
    """
    rows, columns = weight.shape
    layout = Layout(rows, columns, int(torch.count_nonzero(weight)), weight.dtype)
    if grid is None:
        return layout
    values, scales = grid
    kept = weight != 0
    missed = values.decode(values.encode(weight, scales), scales).to(weight.dtype) != weight
    if (missed & kept).any():
        return layout
    size = int(row_bytes(word_counts(_filled(kept, value=False)), values).sum())
    layout = replace(layout, codes=Codes(values, True, size))
    if masked or missed.any():  # a zero that is no level
        return layout
    size = bytes_of_all(layout, values)
    return min(
        layout,
        Layout(rows, columns, rows * columns, weight.dtype, Codes(values, False, size)),
        key=lambda one: one.bytes,
    )


def pack(
    weight: torch.Tensor, grid: Grid | None = None, *, masked: bool = False
) -> tuple[torch.Tensor, Layout]:
    """Packs a dense weight.

    Args:
        weight: (rows, columns), float32, bfloat16 or float16, on any device. Both zeros count as zero.
        grid: that it was rounded to; see `layout_of`.
        masked: have a mask, whatever it costs.

    Returns:
        The packed bytes, (layout.bytes,) uint8 on the CPU, and their layout.
    """
    layout = layout_of(weight, grid, masked=masked)
    return _pack(weight, layout, None if grid is None else grid[1]), layout


def _pack(weight: torch.Tensor, layout: Layout, scales: torch.Tensor | None) -> torch.Tensor:
    """The bytes of a weight in a layout that `layout_of` gave; scales (rows, groups) where it has codes."""
    assert weight.ndim == 2
    assert weight.dtype in DTYPES.values()
    assert weight.shape[0] * padded(weight.shape[1]) <= MOST_WEIGHTS
    weight = weight.detach().cpu()
    kept = weight != 0
    packed = torch.zeros(layout.bytes, dtype=torch.uint8)
    if layout.masked:
        bits = np.packbits(kept.numpy(), axis=1, bitorder="little")
        mask_of(packed, layout)[:, : bits.shape[1]] = torch.from_numpy(bits)
    begin, end = layout.mask_bytes, layout.mask_bytes + layout.value_bytes
    if layout.codes is None:
        packed[begin:end] = weight[kept].view(torch.uint8)
        return packed
    assert scales is not None
    values, scales = layout.codes.values, scales.cpu().bfloat16().contiguous()
    codes = _filled(values.encode(weight, scales), value=0)
    wanted = _filled(kept, value=False) if layout.masked else torch.ones_like(codes, dtype=torch.bool)
    packed[begin:end] = pack_codes(codes, wanted, values)
    packed[end : end + layout.scale_bytes] = scales.view(torch.uint8).flatten()
    return packed


def _filled(matrix: torch.Tensor, *, value: int) -> torch.Tensor:
    """With as many columns more as a row's mask has."""
    return torch.nn.functional.pad(matrix, (0, padded(matrix.shape[1]) - matrix.shape[1]), value=value)


def mask_of(packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The bitmask inside a packed weight that has one, (rows, row_mask_bytes) uint8: a view."""
    assert layout.masked
    return packed[: layout.mask_bytes].view(layout.rows, layout.row_mask_bytes)


def kept_of(packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Which weights are packed, (rows, columns rounded up to 64) bool."""
    if not layout.masked:
        return torch.ones(layout.rows, padded(layout.columns), dtype=torch.bool, device=packed.device)
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (mask_of(packed, layout)[:, :, None] >> bit & 1).bool().flatten(1)


def codes_of(packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The bytes of the codes inside a packed weight: a view."""
    assert layout.codes is not None
    return packed[layout.mask_bytes : layout.mask_bytes + layout.value_bytes]


def scales_of(packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The scales behind a packed weight's codes, (rows, groups) bfloat16."""
    assert layout.codes is not None
    begin = layout.mask_bytes + layout.value_bytes
    scales = packed[begin : begin + layout.scale_bytes].clone()  # for alignment
    return scales.view(torch.bfloat16).view(layout.rows, layout.codes.values.groups(layout.columns))


def values_of(packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The non-zeros of a packed weight, (nonzeros,): a view where alignment allows."""
    values = packed[layout.mask_bytes : layout.mask_bytes + layout.value_bytes]
    if (values.storage_offset() | values.data_ptr()) % layout.dtype.itemsize:
        values = values.clone()
    return values.view(layout.dtype)


def experts_offsets(name: str, packed: torch.Tensor, layout: ExpertsLayout) -> torch.Tensor:
    """The same as `row_offsets` for each expert: (experts, rows + 1)."""
    if packed.dtype != torch.uint8 or packed.shape != (layout.bytes,):
        raise ValueError(
            f"compressed layer '{name}' should be {layout.bytes} bytes, "
            f"but is {packed.dtype} {tuple(packed.shape)}"
        )
    return torch.stack(
        [
            row_offsets(expert_name(name, i), layout.part(packed, i), part)
            for i, part in enumerate(layout.layouts)
        ]
    )


def row_offsets(name: str, packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Where each row's values begin, counted from the mask: the check that a packed weight is what it claims.

    Kernels trust these offsets and read without further checks, so this is the gate that every weight from a
    file must pass.

    Args:
        name: of the layer, for the error.
        packed: (layout.bytes,) uint8.
        layout: what `config.json` says about it.

    Returns:
        (rows + 1,) int32, on the CPU, counted in values, or where they are codes in bytes; the last is
        `layout.nonzeros`, or `layout.codes.bytes`.

    Raises:
        ValueError: the length is wrong, bits are set beyond the last column, the mask does not have
            `layout.nonzeros` bits or makes other bytes of codes, or a scale is not finite.
    """
    if packed.dtype != torch.uint8 or packed.shape != (layout.bytes,):
        raise ValueError(
            f"compressed layer '{name}' should be {layout.bytes} bytes, "
            f"but is {packed.dtype} {tuple(packed.shape)}"
        )
    if layout.codes is not None and not scales_of(packed, layout).isfinite().all():
        raise ValueError(f"compressed layer '{name}' has scales that are not finite")
    if not layout.masked:
        assert layout.codes is not None
        each = layout.codes.bytes // layout.rows
        return torch.arange(layout.rows + 1, dtype=torch.int32) * each
    mask = mask_of(packed, layout).cpu().numpy()
    whole, rest = divmod(layout.columns, 8)
    beyond = mask[:, whole:].copy()
    if rest:
        beyond[:, 0] >>= rest
    if beyond.any():
        raise ValueError(f"compressed layer '{name}' keeps weights beyond its {layout.columns} columns")
    counts = np.bitwise_count(np.ascontiguousarray(mask).view(np.uint64)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts.sum(axis=1))])
    if offsets[-1] != layout.nonzeros:
        raise ValueError(
            f"compressed layer '{name}' has {offsets[-1]} bits in its mask, not {layout.nonzeros}"
        )
    if layout.codes is not None:
        sizes = row_bytes(torch.from_numpy(counts), layout.codes.values)
        offsets = np.concatenate([[0], np.cumsum(sizes.numpy())])
        if offsets[-1] != layout.codes.bytes:
            raise ValueError(
                f"compressed layer '{name}' has {offsets[-1]} bytes of codes by its mask, not "
                f"{layout.codes.bytes}"
            )
    return torch.from_numpy(offsets.astype(np.int32))


def unpack(packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The dense weight (rows, columns) of a packed one that passed `row_offsets`, on its device.

    Plain torch: the reference for every kernel, and the path for machines without one.
    """
    kept = kept_of(packed, layout)[:, : layout.columns]
    if layout.codes is not None:
        values, whole = layout.codes.values, kept_of(packed, layout)
        codes = unpack_codes(codes_of(packed, layout), whole, values)[:, : layout.columns]
        # Adding turns -0 into +0.
        return values.decode(codes, scales_of(packed, layout)).mul_(kept).add_(0.0).to(layout.dtype)
    dense = torch.zeros(layout.rows, layout.columns, dtype=layout.dtype, device=packed.device)
    return dense.masked_scatter_(kept, values_of(packed, layout))
