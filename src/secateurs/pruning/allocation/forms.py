"""What a matrix may become: so many zeros, so many bits; and what it then takes once it is compressed."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from secateurs.pattern import Pattern, Unstructured
from secateurs.runtime.codes import WORD
from secateurs.runtime.layout import Codes, Layout, bytes_of_all, padded
from secateurs.values import Values, parse_values

SHARES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of zeros."""

GRIDS = tuple(parse_values(f"int{bits}:group={group}") for bits, group in product((4, 3, 2), (32, 64, 128)))

FINE = tuple(parse_values(f"int8:group={group}") for group in (32, 64, 128))

UNEVEN = 0.02
"""Codes of 4 bits lie in halves, of which the longer one counts. Chance makes it longer, and what a mask
prefers by so much of them more."""


@dataclass(frozen=True)
class Form:
    """What a matrix may become.

    Args:
        zeros: share of zeros.
        values: the grid of what is left; None leaves it as precise as it is.
    """

    zeros: float
    values: Values | None

    def __str__(self) -> str:
        zeros = f"{self.zeros:.0%} zeros" if self.zeros else ""
        values = f"int{self.values.bits}:group={self.values.group}" if self.values else ""
        return " at ".join(filter(None, (zeros, values))) or "as stored"

    @property
    def pattern(self) -> Pattern | None:
        """For the pruner; None where nothing is to be done."""
        return None if self == AS_STORED else Unstructured(self.zeros)

    def bytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """What a matrix (out, in) takes at most.

        Args:
            shape: of the matrix.
            dtype: that it is stored in.
        """
        rows, columns = shape
        if self == AS_STORED:
            return rows * columns * dtype.itemsize
        kept = rows * columns - round(self.zeros * rows * columns)
        layout = Layout(rows, columns, kept, dtype)
        if self.values is None:  # who prunes row by row rounds in each
            return replace(layout, nonzeros=min(kept + rows, rows * columns)).bytes
        size = self.masked_bytes(shape) if self.zeros else bytes_of_all(layout, self.values)
        return Layout(rows, columns, kept, dtype, Codes(self.values, self.zeros > 0, size)).bytes

    def masked_bytes(self, shape: tuple[int, int]) -> int:
        """Of a matrix's codes behind a mask. They depend on it by a few percent: more is not to be used."""
        rows, columns = shape
        kept = rows * columns - round(self.zeros * rows * columns)
        assert self.values is not None
        bits = self.values.bits
        if bits == 8:
            return kept
        if bits == 4:
            span = max(self.values.group, WORD)
            first = sum(min(span, columns - begin) for begin in range(0, columns, 2 * span))
            chance = 0.4 * math.sqrt(columns * self.zeros * (1 - self.zeros)) * (first < columns)
            longer = kept * max(first, columns - first) / columns
            return min(kept, round((longer + rows * chance) * (1 + UNEVEN)))
        # A word begins at a whole byte: on average so much of one is lost.
        lost = {2: 3 / 8, 3: 7 / 16}[bits]
        return round(kept * bits / 8 + rows * padded(columns) / WORD * lost * (1 + UNEVEN))

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Form":
        """Of `dataclasses.asdict`."""
        return cls(entry["zeros"], None if entry["values"] is None else Values(**entry["values"]))


AS_STORED = Form(0.0, None)

FORMS = tuple(Form(zeros, values) for zeros, values in product(SHARES, (None, *FINE, *GRIDS)))


@dataclass(frozen=True)
class Choice:
    """What the matrices of a model become so that it fits into a budget."""

    forms: Mapping[str, Form]
    """Of every matrix, by name."""
    total: int
    """Bytes that the model may take once it is compressed."""
    bytes: int
    """That it takes at most."""
    error: float
    """How far blocks' outputs move, summed over what was chosen, each measured alone."""
    uniform: Form | None
    """The best choice within the budget that is the same for all matrices; None if there is none."""
    uniform_error: float | None

    def __str__(self) -> str:
        counts = Counter(map(str, self.forms.values())).most_common()
        told = ", ".join(f"{count} {form}" for form, count in counts)
        pays = "" if any(form.zeros for form in self.forms.values()) else "; pruning pays nowhere"
        return f"{told}{pays}"

    @property
    def against(self) -> str:
        """The expected error beside that of the best uniform choice."""
        own = f"expected error {self.error:.3g}"
        if self.uniform_error is None:
            return f"{own}; no uniform choice is within the budget"
        if self.uniform_error <= self.error:
            return f"{own}, the best uniform choice ({self.uniform})"
        return f"{own}, that of the best uniform choice ({self.uniform}) {self.uniform_error:.3g}"

    def to_json(self) -> dict[str, Any]:
        """For `secateurs.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Choice":
        """What `to_json` gave."""
        uniform = entry["uniform"]
        forms = {name: Form.from_json(form) for name, form in entry["forms"].items()}
        return cls(**{**entry, "forms": forms, "uniform": uniform and Form.from_json(uniform)})
