"""What a budget leaves for a model's matrices: known from names, dtypes and shapes alone.

A budget is of the model as `compress` writes it. What compress cannot pack it leaves as it is stored, so that
nothing is to be gained from pruning it; and the matrices of experts that share a parameter are codes of one
grid, or none are: all of a parameter's matrices get the same form.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch

from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint.names import skeleton_of
from secateurs.pruning.allocation.forms import AS_STORED, FORMS, Form
from secateurs.runtime.layout import DTYPES, MOST_WEIGHTS, PART_BYTES, padded
from secateurs.runtime.packable import read_elsewhere
from secateurs.runtime.parameters import Parameters
from secateurs.runtime.survey import WORTH, apart

HEADER_BYTES = 160
"""Of a packed parameter's entry in its file, beside the name, where it has none as long as it is dense."""


@dataclass(frozen=True)
class Parameter:
    """A parameter that can be packed.

    Args:
        matrices: in it, by their names in the model: one, or all experts'.
        shape: (out, in) of each.
        dtype: that it is stored in.
        experts: whether they are experts'.
    """

    matrices: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    experts: bool

    def bytes(self, form: Form) -> int:
        """What it takes in a form, at most. Where that saves little, compress does not pack it."""
        one, dense = form.bytes(self.shape, self.dtype), AS_STORED.bytes(self.shape, self.dtype)
        if self.experts and form != AS_STORED:
            one = -(-one // PART_BYTES) * PART_BYTES
        return len(self.matrices) * (one if one <= WORTH * dense else dense)


@dataclass(frozen=True)
class Room:
    """Bytes, and what they are for.

    Args:
        total: bytes that the model may take, or for bytes a weight its matrices.
        rest: bytes that are taken whatever is chosen.
        parameters: that can be packed.
        others: names of the matrices that cannot.
        weights: of all matrices, where the budget was in bytes a weight.
    """

    total: int
    rest: int
    parameters: tuple[Parameter, ...]
    others: tuple[str, ...]
    weights: int | None

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Of each parameter in each of FORMS."""
        return [[parameter.bytes(form) for form in FORMS] for parameter in self.parameters]

    def check(self) -> None:
        """Raises ValueError where there is nothing to choose."""
        least = self.rest + sum(map(min, self.sizes))
        most = self.rest + sum(parameter.bytes(AS_STORED) for parameter in self.parameters)
        if self.total < least:
            raise ValueError(
                f"the budget of {self._told(self.total)} is below the least that this model can take, "
                f"{self._told(least, up=True)}"
            )
        if self.total >= most:
            raise ValueError(
                f"the budget of {self._told(self.total)} holds the model as it is "
                f"({self._told(most, up=True)}): there is nothing to prune"
            )

    def _told(self, count: int, *, up: bool = False) -> str:
        if self.weights is not None:
            each, unit, digits = self.weights, "bytes a weight", 4
        else:
            sizes = ((10**6, "MB", 2), (1000, "KB", 2), (1, "bytes", 0))
            each, unit, digits = next((one for one in sizes if count >= one[0]), sizes[-1])
        amount = count / each
        if up:
            amount = math.ceil(amount * 10**digits) / 10**digits
        return f"{amount:.{digits}f} {unit}"


def room_in(model: BlockwiseModel, files: int, *, budget: int | None, bytes_per_weight: float | None) -> Room:
    """What is to be shared out between the matrices of a model.

    Args:
        model: the dense model.
        files: bytes of its weight files, as they will be written.
        budget: bytes of the whole compressed model; or
        bytes_per_weight: of its matrices alone.
    """
    skeleton = skeleton_of(model.checkpoint)
    parameters = Parameters(model.checkpoint, skeleton)
    names = {packable.parameter: name for name, packable in parameters.packables.items()}
    elsewhere = read_elsewhere(skeleton)
    matrices: dict[str, list[str]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    experts: dict[str, bool] = {}
    for index, anatomy in enumerate(model.anatomy.blocks):
        for matrix in anatomy.matrices.values():
            weight = f"{model.path}.{index}.{matrix.weight}"
            matrices.setdefault(weight, []).append(f"{model.path}.{index}.{matrix.name}")
            shapes[weight], experts[weight] = matrix.shape, matrix.expert is not None
    uses = Counter(piece.stored for weight in matrices for piece in parameters.pieces[weight])
    sizes = {weight: math.prod(shapes[weight]) * len(own) for weight, own in matrices.items()}
    items: list[Parameter] = []
    others: list[str] = []
    bytes_of_others = 0
    for weight, own in matrices.items():
        pieces, (rows, columns) = parameters.pieces[weight], shapes[weight]
        dtypes = {piece.dtype for piece in pieces}
        packed = (
            weight in names
            and names[weight] not in elsewhere
            # Experts that are none of the block's matrices stay off the grid, and then all are packed so.
            and parameters.packables[names[weight]].count == len(own)
            and apart(pieces, experts=experts[weight])
            and dtypes in ({dtype} for dtype in DTYPES.values())
            and rows * padded(columns) <= MOST_WEIGHTS
            # Not one that another block uses, too.
            and all(uses[piece.stored] == 1 for piece in pieces)
        )
        if packed:
            items.append(Parameter(tuple(own), shapes[weight], dtypes.pop(), experts[weight]))
        else:
            others += own
            bytes_of_others += sizes[weight] * pieces[0].dtype.itemsize
    if bytes_per_weight is None:
        assert budget is not None
        dense = sum(item.bytes(AS_STORED) for item in items)
        entries = sum(HEADER_BYTES + len(weight) for weight in matrices if experts[weight])
        return Room(budget, files + entries - dense, tuple(items), tuple(others), None)
    weights = sum(sizes.values())
    # A budget that a refusal names is one byte short where it is not a fraction of two.
    total = math.floor(bytes_per_weight * weights + 1e-6)
    return Room(total, bytes_of_others, tuple(items), tuple(others), weights)
