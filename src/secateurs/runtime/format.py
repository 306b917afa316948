"""The compressed form of one weight: a bitmask, then the packed non-zeros, in one flat tensor of bytes.

A decoder reads every weight for every token, so what counts is bytes: `(1 - s) * b + 1/8` per weight at
sparsity s with values of b bytes. There are no stored offsets that a file could lie about: where a row
begins is the prefix sum of the mask's bits, counted once when the weight is loaded, and compared with the
promised length. The layout is documented in docs/format.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch

VERSION, VERSION_WITH_EXPERTS = 1, 2
"""What is written: the later one only where it is needed."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESERVED_DTYPES = ("int8", "int4")  # with group scales; named in version 1 so that its readers can say so
TAIL_BYTES = 64  # zeros behind the last value, so that vector loads may run over it
PART_BYTES = 64  # of which each expert's packed matrix begins at a multiple
MOST_WEIGHTS = 2**31 - 1  # of a matrix, its columns rounded up to 64: what counts them has 32 bits


def padded(columns: int) -> int:
    """Columns of a row's mask: rounded up to 64."""
    return (columns + 63) // 64 * 64


@dataclass(frozen=True)
class Layout:
    """What is needed to read a packed weight W (rows, columns).

    Args:
        rows: output features.
        columns: input features.
        nonzeros: packed values.
        dtype: of the values.
    """

    rows: int
    columns: int
    nonzeros: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns)

    @property
    def row_mask_bytes(self) -> int:
        """Bytes of one row's mask: padded to 64 bits."""
        return padded(self.columns) // 8

    @property
    def mask_bytes(self) -> int:
        return self.rows * self.row_mask_bytes

    @property
    def bytes(self) -> int:
        """Bytes of the whole packed tensor."""
        return self.mask_bytes + self.nonzeros * self.dtype.itemsize + TAIL_BYTES

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
        return {"shape": [self.rows, self.columns], "values": dtype, "nonzeros": self.nonzeros}

    @classmethod
    def from_json(cls, name: str, entry: Any) -> "Layout":
        """Reads an entry of `config.json`, trusting nothing.

        Raises:
            ValueError: a field is missing, of another type or out of bounds; names the layer.
        """
        if not isinstance(entry, dict) or set(entry) != {"shape", "values", "nonzeros"}:
            raise ValueError(
                f"compressed layer '{name}' needs 'shape', 'values' and 'nonzeros', and nothing else"
            )
        shape, dtype, nonzeros = entry["shape"], entry["values"], entry["nonzeros"]
        if dtype in RESERVED_DTYPES:
            raise ValueError(
                f"compressed layer '{name}' has '{dtype}' values, which this version cannot read yet"
            )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(
                f"compressed layer '{name}' has values of unknown dtype {dtype!r}; known: {[*DTYPES]}"
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
        return cls(rows, columns, nonzeros, DTYPES[dtype])


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
        return {
            **self.layouts[0].to_json(),
            "shape": list(self.shape),
            "nonzeros": [layout.nonzeros for layout in self.layouts],
            "stored": {name: list(shape) for name, shape in self.stored.items()},
        }

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any]) -> "ExpertsLayout":
        """Reads an entry of `config.json`, trusting nothing.

        Raises:
            ValueError: as `Layout.from_json`.
        """
        nonzeros, stored = entry.get("nonzeros"), entry.get("stored")
        experts, *shape = entry["shape"]
        if type(experts) is not int or not isinstance(nonzeros, list) or not 0 < experts == len(nonzeros):
            raise ValueError(f"compressed layer '{name}' needs as many 'nonzeros' as it has experts")
        if not isinstance(stored, dict) or not all(
            isinstance(sides, list) and all(type(n) is int and n > 0 for n in sides)
            for sides in stored.values()
        ):
            raise ValueError(f"compressed layer '{name}' needs the names and shapes that it is 'stored' as")
        others = {key: value for key, value in entry.items() if key != "stored"}
        layouts = tuple(
            Layout.from_json(expert_name(name, i), {**others, "shape": shape, "nonzeros": count})
            for i, count in enumerate(nonzeros)
        )
        return cls(layouts, {key: tuple(sides) for key, sides in stored.items()})


def expert_name(name: str, expert: int) -> str:
    """One expert's matrix by the name of the parameter that holds them all, for people."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{expert}.{last}"


def read_layout(name: str, entry: Any, version: int) -> Layout | ExpertsLayout:
    """Reads an entry of `config.json`; ValueError as `Layout.from_json`."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if version == VERSION_WITH_EXPERTS and isinstance(shape, list) and len(shape) == 3:
        return ExpertsLayout.from_json(name, entry)
    return Layout.from_json(name, entry)


def pack_experts(
    weights: torch.Tensor, stored: Mapping[str, tuple[int, ...]]
) -> tuple[torch.Tensor, ExpertsLayout]:
    """Packs the matrices of all experts, (experts, rows, columns); see `ExpertsLayout` and `pack`."""
    layout = ExpertsLayout(tuple(map(layout_of, weights)), stored)
    packed = torch.zeros(layout.bytes, dtype=torch.uint8)
    for expert, weight in enumerate(weights):
        layout.part(packed, expert).copy_(pack(weight)[0])
    return packed, layout


def layout_of(weight: torch.Tensor) -> Layout:
    """Of a weight (rows, columns) once it is packed."""
    rows, columns = weight.shape
    return Layout(rows, columns, int(torch.count_nonzero(weight)), weight.dtype)


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """Packs a dense weight.

    Args:
        weight: (rows, columns), float32, bfloat16 or float16, on any device. Both zeros count as zero.

    Returns:
        The packed bytes, (layout.bytes,) uint8 on the CPU, and their layout.
    """
    assert weight.ndim == 2
    assert weight.dtype in DTYPES.values()
    assert weight.shape[0] * padded(weight.shape[1]) <= MOST_WEIGHTS
    weight = weight.detach().cpu()
    kept = weight != 0
    values = weight[kept]
    layout = Layout(weight.shape[0], weight.shape[1], len(values), weight.dtype)
    packed = torch.zeros(layout.bytes, dtype=torch.uint8)
    bits = np.packbits(kept.numpy(), axis=1, bitorder="little")
    mask_of(packed, layout)[:, : bits.shape[1]] = torch.from_numpy(bits)
    packed[layout.mask_bytes : layout.bytes - TAIL_BYTES] = values.view(torch.uint8)
    return packed, layout


def mask_of(packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The bitmask inside a packed weight, (rows, row_mask_bytes) uint8: a view."""
    return packed[: layout.mask_bytes].view(layout.rows, layout.row_mask_bytes)


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
        (rows + 1,) int32, on the CPU; the last is `layout.nonzeros`.

    Raises:
        ValueError: the length is wrong, bits are set beyond the last column, or the mask does not have
            `layout.nonzeros` bits.
    """
    if packed.dtype != torch.uint8 or packed.shape != (layout.bytes,):
        raise ValueError(
            f"compressed layer '{name}' should be {layout.bytes} bytes, "
            f"but is {packed.dtype} {tuple(packed.shape)}"
        )
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
    return torch.from_numpy(offsets.astype(np.int32))


def unpack(packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The dense weight (rows, columns) of a packed one that passed `row_offsets`, on its device.

    Plain torch: the reference for every kernel, and the path for machines without one.
    """
    mask = mask_of(packed, layout)
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    kept = (mask[:, :, None] >> bit & 1).bool().flatten(1)[:, : layout.columns]
    dense = torch.zeros(layout.rows, layout.columns, dtype=layout.dtype, device=packed.device)
    return dense.masked_scatter_(kept, values_of(packed, layout))
