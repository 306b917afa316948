"""What `config.json` says of packed weights: sizes, and what the values are. Read trusting nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import torch

from secateurs.runtime.codes import WORD, row_bytes
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
    if not masked and (layout.nonzeros, size) != (layout.rows * layout.columns, bytes_of_all(layout, values)):
        raise ValueError(f"compressed layer '{name}' has no mask, and codes of other than all its weights")
    if not 0 <= size <= bytes_of_all(layout, values):
        raise ValueError(f"compressed layer '{name}' promises {size} bytes of codes, more than it can have")
    return Codes(values, masked, size)


def bytes_of_all(layout: Layout, values: Values) -> int:
    """Of a weight's codes where all are kept, and the most that there can be."""
    return layout.rows * int(row_bytes(torch.full((1, padded(layout.columns) // WORD), WORD), values))


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
