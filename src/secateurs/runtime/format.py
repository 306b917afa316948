"""The compressed form of one weight: a bitmask, then the packed non-zeros, in one flat tensor of bytes.

A decoder reads every weight for every token, so what counts is bytes: `(1 - s) * b + 1/8` per weight at
sparsity s with values of b bytes. Values may also be codes of a few bits, with scales behind them, and then
the mask may be missing. There are no stored offsets that a file could lie about: where a row begins follows
from the mask's bits, counted once when the weight is loaded, and compared with the promised length. The
layout is documented in docs/format.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch

from secateurs.runtime.codes import pack_codes, row_bytes, unpack_codes
from secateurs.values import Values

VERSION, VERSION_WITH_EXPERTS, VERSION_WITH_CODES = VERSIONS = 1, 2, 3
"""What is written: a later one only where it is needed."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
OF_CODES = ("group", "grid", "mask", "bytes", "dtype")
TAIL_BYTES = 64  # zeros behind the last value, so that vector loads may run over it
PART_BYTES = 64  # of which each expert's packed matrix begins at a multiple
MOST_WEIGHTS = 2**31 - 1  # of a matrix, its columns rounded up to 64: what counts them has 32 bits


def padded(columns: int) -> int:
    """Columns of a row's mask: rounded up to 64."""
    return (columns + 63) // 64 * 64


@dataclass(frozen=True)
class Codes:
    """What is needed to read values of a few bits.

    Args:
        values: the grid.
        masked: whether a mask says which weights they are of; without one they are of all.
        bytes: of all codes. With a mask that follows from it, and is checked.
    """

    values: Values
    masked: bool
    bytes: int


@dataclass(frozen=True)
class Layout:
    """What is needed to read a packed weight W (rows, columns).

    Args:
        rows: output features.
        columns: input features.
        nonzeros: packed values.
        dtype: of the values, or where they are codes of the dense weight.
        codes: where values are codes.
    """

    rows: int
    columns: int
    nonzeros: int
    dtype: torch.dtype
    codes: Codes | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns)

    @property
    def row_mask_bytes(self) -> int:
        """Bytes of one row's mask: padded to 64 bits."""
        return padded(self.columns) // 8

    @property
    def masked(self) -> bool:
        return self.codes is None or self.codes.masked

    @property
    def mask_bytes(self) -> int:
        return self.rows * self.row_mask_bytes if self.masked else 0

    @property
    def value_bytes(self) -> int:
        return self.nonzeros * self.dtype.itemsize if self.codes is None else self.codes.bytes

    @property
    def scale_bytes(self) -> int:
        return 0 if self.codes is None else self.rows * self.codes.values.groups(self.columns) * 2

    @property
    def bytes(self) -> int:
        """Bytes of the whole packed tensor."""
        return self.mask_bytes + self.value_bytes + self.scale_bytes + TAIL_BYTES

    @property
    def dense_bytes(self) -> int:
        return self.rows * self.columns * self.dtype.itemsize

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.nonzeros / (self.rows * self.columns)

    def to_json(self) -> dict[str, Any]:
        """The entry of this weight in `config.json`."""
        dtype = str(self.dtype).removeprefix("torch.")
        entry = {"shape": [self.rows, self.columns], "values": dtype, "nonzeros": self.nonzeros}
        if self.codes is None:
            return entry
        values = self.codes.values
        return {
            **entry,
            "values": f"int{values.bits}",
            "group": values.group,
            "grid": values.grid,
            "mask": self.codes.masked,
            "bytes": self.codes.bytes,
            "dtype": dtype,
        }

    @classmethod
    def from_json(cls, name: str, entry: Any) -> "Layout":
        """Reads an entry of `config.json`, trusting nothing.

        Raises:
            ValueError: a field is missing, of another type or out of bounds; names the layer.
        """
        values = entry.get("values") if isinstance(entry, dict) else None
        coded = isinstance(values, str) and values in CODES
        needed = ["shape", "values", "nonzeros", *(OF_CODES if coded else ())]
        if not isinstance(entry, dict) or set(entry) != set(needed):
            names = ", ".join(f"'{field}'" for field in needed[:-1])
            raise ValueError(f"compressed layer '{name}' needs {names} and '{needed[-1]}', and nothing else")
        shape, kind, nonzeros = entry["shape"], entry["values"], entry["nonzeros"]
        dtype = entry["dtype"] if coded else kind
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(
                f"compressed layer '{name}' has values of unknown dtype {dtype!r}; known: {[*DTYPES, *CODES]}"
            )
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(
                f"compressed layer '{name}' needs two positive sizes as its shape, not {shape!r}"
            )
        rows, columns = shape
        if rows * padded(columns) > MOST_WEIGHTS:
            raise ValueError(
                f"compressed layer '{name}' has {rows} x {columns} weights; at most 2^31 - 1 fit"
            )
        if type(nonzeros) is not int or not 0 <= nonzeros <= rows * columns:
            raise ValueError(
                f"compressed layer '{name}' promises {nonzeros!r} non-zeros of {rows * columns} weights"
            )
        layout = cls(rows, columns, nonzeros, DTYPES[dtype])
        return replace(layout, codes=_codes(name, entry, layout)) if coded else layout


@dataclass(frozen=True)
class ExpertsLayout:
    """What is needed to read a block's experts: their packed matrices lie one after the other in one tensor.

    Args:
        layouts: of each expert's matrix, all of one shape and dtype.
        stored: the tensors that the dense matrices were stored as, and are again once decompressed: their
            shapes by their names, with an asterisk for the expert's number where each has its own.
    """

    layouts: tuple[Layout, ...]
    stored: Mapping[str, tuple[int, ...]]

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, rows, columns)."""
        return (len(self.layouts), *self.layouts[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.layouts[0].dtype

    @property
    def codes(self) -> Codes | None:
        """Of the first expert; all have codes or none has."""
        return self.layouts[0].codes

    @property
    def value_bytes(self) -> int:
        """Of all experts."""
        return sum(layout.value_bytes for layout in self.layouts)

    @property
    def nonzeros(self) -> int:
        """Of all experts."""
        return sum(layout.nonzeros for layout in self.layouts)

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.nonzeros / prod(self.shape)

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Where each expert's packed matrix begins, and where the last one's ends, in bytes."""
        sizes = (-(-layout.bytes // PART_BYTES) * PART_BYTES for layout in self.layouts)
        return tuple(accumulate(sizes, initial=0))

    @property
    def bytes(self) -> int:
        """Bytes of the whole packed tensor."""
        return self.begins[-1]

    @property
    def dense_bytes(self) -> int:
        return sum(layout.dense_bytes for layout in self.layouts)

    def part(self, packed: torch.Tensor, expert: int) -> torch.Tensor:
        """One expert's packed matrix: a view."""
        begin = self.begins[expert]
        return packed[begin : begin + self.layouts[expert].bytes]

    def to_json(self) -> dict[str, Any]:
        """The entry of these experts in `config.json`."""
        codes = [layout.codes.bytes for layout in self.layouts if layout.codes is not None]
        return {
            **self.layouts[0].to_json(),
            "shape": list(self.shape),
            "nonzeros": [layout.nonzeros for layout in self.layouts],
            **({"bytes": codes} if codes else {}),
            "stored": {name: list(shape) for name, shape in self.stored.items()},
        }

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any]) -> "ExpertsLayout":
        """Reads an entry of `config.json`, trusting nothing.

        Raises:
            ValueError: as `Layout.from_json`.
        """
        stored = entry.get("stored")
        experts, *shape = entry["shape"]
        each = ["nonzeros", *(["bytes"] if str(entry.get("values")) in CODES else [])]
        counts = {field: entry.get(field) for field in each}
        for field, count in counts.items():
            if type(experts) is not int or not isinstance(count, list) or not 0 < experts == len(count):
                raise ValueError(f"compressed layer '{name}' needs as many '{field}' as it has experts")
        if not isinstance(stored, dict) or not all(
            isinstance(sides, list) and all(type(n) is int and n > 0 for n in sides)
            for sides in stored.values()
        ):
            raise ValueError(f"compressed layer '{name}' needs the names and shapes that it is 'stored' as")
        others = {key: value for key, value in entry.items() if key != "stored"}
        layouts = tuple(
            Layout.from_json(
                expert_name(name, i),
                {**others, "shape": shape, **{field: count[i] for field, count in counts.items()}},  # type: ignore[index]
            )
            for i in range(experts)
        )
        return cls(layouts, {key: tuple(sides) for key, sides in stored.items()})


def _codes(name: str, entry: Mapping[str, Any], layout: Layout) -> Codes:
    """What an entry of `config.json` says of its codes; ValueError as `Layout.from_json`."""
    group, grid, masked, size = (entry[field] for field in ("group", "grid", "mask", "bytes"))
    if type(group) is not int or type(masked) is not bool or type(size) is not int:
        raise ValueError(f"compressed layer '{name}' has a 'group', 'mask' or 'bytes' of another type")
    try:
        values = Values(CODES[entry["values"]], group, grid)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ValueError(f"compressed layer '{name}': {error}") from None
    if not masked and (layout.nonzeros, size) != (layout.rows * layout.columns, _all_bytes(layout, values)):
        raise ValueError(f"compressed layer '{name}' has no mask, and codes of other than all its weights")
    if not 0 <= size <= _all_bytes(layout, values):
        raise ValueError(f"compressed layer '{name}' promises {size} bytes of codes, more than it can have")
    return Codes(values, masked, size)


def _all_bytes(layout: Layout, values: Values) -> int:
    """Of a weight's codes where all are kept, and the most that there can be."""
    return layout.rows * int(row_bytes(torch.ones(1, padded(layout.columns), dtype=torch.bool), values))


def expert_name(name: str, expert: int) -> str:
    """One expert's matrix by the name of the parameter that holds them all, for people."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{expert}.{last}"


def read_layout(name: str, entry: Any, version: int) -> Layout | ExpertsLayout:
    """Reads an entry of `config.json`; ValueError as `Layout.from_json`."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    values = entry.get("values") if isinstance(entry, dict) else None
    if version < VERSION_WITH_CODES and isinstance(values, str) and values in CODES:
        raise ValueError(
            f"compressed layer '{name}' has '{values}' values, which come with version {VERSION_WITH_CODES} "
            "of the format"
        )
    if version >= VERSION_WITH_EXPERTS and isinstance(shape, list) and len(shape) == 3:
        return ExpertsLayout.from_json(name, entry)
    return Layout.from_json(name, entry)


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
    """Of the matrices of all experts once they are packed, all in the same way; see `layout_of`."""
    if grid is not None:
        values, scales = grid
        for masked in (False, True):
            layouts = [layout_of(w, (values, s), masked=masked) for w, s in zip(weights, scales, strict=True)]
            if all(one.codes is not None and one.masked == layouts[0].masked for one in layouts):
                return ExpertsLayout(tuple(layouts), stored)
    return ExpertsLayout(tuple(map(layout_of, weights)), stored)


def layout_of(weight: torch.Tensor, grid: Grid | None = None, *, masked: bool = False) -> Layout:
    """Of a weight (rows, columns) once it is packed: the form of least bytes that gives it back exactly.

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
    size = int(row_bytes(_filled(kept, value=False), values).sum())
    layout = replace(layout, codes=Codes(values, True, size))
    if masked or missed.any():  # a zero that is no level
        return layout
    size = _all_bytes(layout, values)
    return min(
        layout,
        Layout(rows, columns, rows * columns, weight.dtype, Codes(values, False, size)),
        key=lambda one: one.bytes,
    )


def pack(weight: torch.Tensor, grid: Grid | None = None) -> tuple[torch.Tensor, Layout]:
    """Packs a dense weight.

    Args:
        weight: (rows, columns), float32, bfloat16 or float16, on any device. Both zeros count as zero.
        grid: that it was rounded to; see `layout_of`.

    Returns:
        The packed bytes, (layout.bytes,) uint8 on the CPU, and their layout.
    """
    layout = layout_of(weight, grid)
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
    values = packed[layout.mask_bytes : layout.bytes - TAIL_BYTES]
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
    counts = np.bitwise_count(np.ascontiguousarray(mask)).sum(axis=1, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if offsets[-1] != layout.nonzeros:
        raise ValueError(
            f"compressed layer '{name}' has {offsets[-1]} bits in its mask, not {layout.nonzeros}"
        )
    if layout.codes is not None:
        sizes = row_bytes(kept_of(packed.cpu(), layout), layout.codes.values).numpy()
        offsets = np.concatenate([[0], np.cumsum(sizes)])
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
