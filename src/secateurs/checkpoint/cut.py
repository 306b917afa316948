"""A model folder seen with fewer experts: what is left of its tensors, under the names of the smaller model.

Experts with tensors of their own are renumbered: the third that is kept goes by the third's names. Of tensors
that hold something of every expert, what is kept is read. Which experts these are may be said later, before
the first is read: names, shapes and the configuration follow from their number alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateurs.checkpoint.pieces import Piece
from secateurs.checkpoint.reading import Checkpoint


@dataclass(frozen=True)
class Side:
    """The side of a parameter along which a block's experts lie, one after the other."""

    block: int
    """The number of the block."""
    axis: int
    """Which of the parameter's sides it is."""
    size: int
    experts: int
    """How many there are."""
    each: int
    """Places of an expert: 1, or more where the parameter has the experts' matrices one below the other. What
    the side has beyond all of theirs stays, such as a router's rows for experts that compute nothing."""

    def numbers(self, kept: Iterable[int]) -> list[int]:
        """What is left: experts by number, and what comes after them, numbered on."""
        return [*kept, *range(self.experts, self.size // self.each)]


class _Own(NamedTuple):
    """A stored tensor of one expert."""

    side: Side
    number: int
    names: dict[int, str]
    """What it and its like are called, by number."""


class _Shared(NamedTuple):
    """A stored tensor with something of every expert."""

    side: Side
    axis: int
    numbers: list[int]
    """Whose each place along the axis is."""

    def places(self, kept: Iterable[int]) -> list[int]:
        """What is left of them."""
        left = set(self.side.numbers(kept))
        return [place for place, number in enumerate(self.numbers) if number in left]


class CutCheckpoint(Checkpoint):
    """A checkpoint's tensors with fewer experts.

    Args:
        dense: all of it. Its tensors must have got their last names.
        config: what the `config.json` of the model with fewer experts is to hold.
        pieces: of all its parameters.
        sides: of those that hold something of experts, by name.
        count: how many of each block's experts are left.

    Raises:
        ValueError: a tensor is stored in a way in which experts are not apart. Names it.
    """

    edited = True

    def __init__(
        self,
        dense: Checkpoint,
        config: dict[str, Any],
        pieces: Mapping[str, Sequence[Piece]],
        sides: Mapping[str, Side],
        count: int,
    ) -> None:
        self.dense, self.folder, self.files, self.config = dense, dense.folder, dense.files, config
        self._kept: Mapping[int, Sequence[int]] = {}
        self._own: dict[str, _Own] = {}
        self._shared: dict[str, _Shared] = {}
        for name, side in sides.items():
            self._find(pieces[name], side)
        self.file_of, self.shapes, self.dtypes = {}, {}, {}
        for name, file in dense.file_of.items():
            shape, own = dense.shapes[name], self._own.get(name)
            if own and own.number >= len(own.side.numbers(range(count))):
                continue
            if name in self._shared:
                axis, left = self._shared[name].axis, len(self._shared[name].places(range(count)))
                shape = (*shape[:axis], left, *shape[axis + 1 :])
            self.file_of[name], self.shapes[name], self.dtypes[name] = file, shape, dense.dtypes[name]

    def _find(self, pieces: Sequence[Piece], side: Side) -> None:
        """Note whose each piece of a parameter is."""
        own: dict[int, list[Piece]] = {}
        for stored, inside in groupby(sorted(pieces, key=lambda each: each.stored), lambda each: each.stored):
            parts = sorted(inside, key=lambda each: each.offset)
            whose = [_along(piece, side) for piece in parts]
            numbers = {first for first, _ in whose}
            if len(numbers) == 1 and not any(axis is not None for _, axis in whose):
                own.setdefault(numbers.pop(), []).append(parts[0])
            else:
                self._shared[stored] = _Shared(side, *_places(parts, side))
        # The first tensor of one corresponds to the first of another, and so on.
        for alike in zip(
            *(sorted(each, key=lambda piece: piece.offset) for each in own.values()), strict=True
        ):
            names = {number: piece.stored for number, piece in zip(own, alike, strict=True)}
            self._own |= {name: _Own(side, number, names) for number, name in names.items()}

    def keep(self, kept: Mapping[int, Sequence[int]]) -> None:
        """Say which experts are left: their numbers, rising, for each block that has some."""
        self._kept = kept

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Checkpoint.load`."""
        stored = {name: self._stored(name) for name in names}
        tensors = self.dense.load(stored.values())
        return {name: self._left(name, tensors[before]) for name, before in stored.items()}

    def _stored(self, name: str) -> str:
        """What a tensor was called when there were all experts."""
        if name not in self._own:
            return name
        own = self._own[name]
        return own.names[own.side.numbers(self._kept[own.side.block])[own.number]]

    def _left(self, name: str, tensor: Tensor) -> Tensor:
        """What is left of a tensor."""
        if name not in self._shared:
            return tensor
        shared = self._shared[name]
        places = shared.places(self._kept[shared.side.block])
        return tensor.index_select(shared.axis, torch.tensor(places))


def _number(piece: Piece, side: Side, axis: int, place: int) -> int:
    """Whose a piece's elements at a place along one of its axes are, the others at their beginning."""
    beyond = prod(piece.parameter_shape[side.axis + 1 :])
    step = piece.stride[axis] * place if piece.shape else 0
    return (piece.offset + step) // beyond % side.size // side.each


def _along(piece: Piece, side: Side) -> tuple[int, int | None]:
    """Whose the first element of a piece is; and along which of its axes others' follow, if any do."""
    first = _number(piece, side, 0, 0)
    axes = (axis for axis, size in enumerate(piece.shape) if _number(piece, side, axis, size - 1) != first)
    return first, next(axes, None)


def _places(pieces: Sequence[Piece], side: Side) -> tuple[int, list[int]]:
    """Along which axis of a stored tensor experts lie, and whose each place is.

    Args:
        pieces: all of the tensor.
        side: of the parameter that they are of.
    """
    shape = pieces[0].stored_shape
    for axis, stride in enumerate(torch.empty(shape, device="meta").stride()):
        whose: dict[int, set[int]] = {}
        for piece in pieces:
            first, along = _along(piece, side)
            start = piece.stored_offset // stride % shape[axis]
            here = [i for i, step in enumerate(piece.stored_stride) if stride <= step < stride * shape[axis]]
            if along is not None and along not in here:
                break
            for i in here:
                for place in range(piece.shape[i]):
                    at = start + place * piece.stored_stride[i] // stride
                    whose.setdefault(at, set()).add(_number(piece, side, i, place))
            if not here:
                whose.setdefault(start, set()).add(first)
        else:
            if len(whose) == shape[axis] and all(len(numbers) == 1 for numbers in whose.values()):
                return axis, [whose[at].pop() for at in range(shape[axis])]
    raise ValueError(f"experts cannot be dropped: '{pieces[0].stored}', as it is stored, has them intermixed")
