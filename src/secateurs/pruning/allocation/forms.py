"""What each matrix becomes so that a model fits into so many bytes: how many zeros, how many bits.

Each matrix is pruned alone to several sparsities, and rounded alone to several grids, and how far its block's
output moves (`measured`) is what counts. Zeros and rounding are taken to add up, as different matrices are:
on the bundled model the two together move a block by 0.9 to 1.05 times the sum. Of all choices within the
budget that of the least sum is made (`afford`), and it is compared with the best of those that treat all
matrices alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

from torch import Tensor

from secateurs.budget import afford
from secateurs.pattern import Unstructured
from secateurs.pruning.allocation.measured import Measured, measured
from secateurs.pruning.allocation.survey import Survey
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.values import Values, parse_values

SHARES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of zeros."""

GRIDS = tuple(parse_values(f"int{bits}:group={group}") for bits, group in product((4, 3, 2), (32, 64, 128)))
"""At which errors are measured."""

FINE = tuple(parse_values(f"int8:group={group}") for group in (32, 64, 128))
"""Their steps are a sixteenth of four bits', and so is the root of the error."""

TOKENS = 1024
"""Of the calibration text on which errors are measured."""

SLACK = 0.03
"""Codes behind a mask are padded: at most so much of them, in matrices that are not tiny."""

TAIL = 64


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
        values = "as they are" if self.values is None else str(self.values)
        return f"{self.zeros:.0%} zeros, {values}" if self.zeros else values

    def bytes(self, shape: tuple[int, int], itemsize: int) -> int:
        """What a matrix (out, in) takes in a compressed model, at most.

        Args:
            shape: of the matrix.
            itemsize: bytes of a weight that is stored as it is.
        """
        rows, columns = shape
        kept = rows * columns - round(self.zeros * rows * columns)
        if self.values is None:
            codes = scales = 0.0
            values = kept * itemsize
        else:
            codes = kept * self.values.bits / 8 * (1 + SLACK * bool(self.zeros))
            scales, values = 2 * rows * self.values.groups(columns), 0
        mask = rows * -(-columns // 64) * 8 if self.zeros else 0
        tail = TAIL if self.zeros or self.values else 0
        return int(mask + codes + scales + values) + tail


FORMS = tuple(Form(zeros, values) for zeros, values in product(SHARES, (None, *FINE, *GRIDS)))


@dataclass(frozen=True)
class Choice:
    """What was chosen for the matrices of a model."""

    forms: Mapping[str, Form]
    """By their names."""
    bytes: int
    """Of all of them."""
    error: float
    """The sum of what was measured."""
    uniform: Form | None
    """The best choice within the budget that is the same for all; None if there is none."""
    uniform_error: float | None


def least_bytes(shapes: Mapping[str, tuple[int, int]], itemsizes: Mapping[str, int]) -> int:
    """What all matrices take at the least."""
    return sum(min(form.bytes(shapes[name], itemsizes[name]) for form in FORMS) for name in shapes)


def choose_forms(survey: Survey, itemsizes: Mapping[str, int], total: int) -> Choice:
    """Choose for a dense model.

    Args:
        survey: of the model.
        itemsizes: bytes of a stored weight of each matrix.
        total: bytes for all matrices, at least `least_bytes`.

    Raises:
        FloatingPointError: the inputs of a layer hold NaN or Inf; names it.
    """
    pruned = [partial(_pruned, zeros=zeros) for zeros in SHARES[1:]]
    rounded = [partial(_rounded, values=values) for values in GRIDS]
    layers = measured(survey, TOKENS, [*pruned, *rounded])
    costs = [_costs(layer) for layer in layers.values()]
    sizes = [[form.bytes(layer.shape, itemsizes[name]) for form in FORMS] for name, layer in layers.items()]
    chosen = afford(sizes, costs, total)
    assert chosen is not None
    alike = [
        (sum(own[i] for own in costs), i) for i in range(len(FORMS)) if sum(own[i] for own in sizes) <= total
    ]
    uniform_error, uniform = min(alike, default=(None, None))
    return Choice(
        {name: FORMS[i] for name, i in zip(layers, chosen, strict=True)},
        sum(own[i] for own, i in zip(sizes, chosen, strict=True)),
        sum(own[i] for own, i in zip(costs, chosen, strict=True)),
        None if uniform is None else FORMS[uniform],
        uniform_error,
    )


def _costs(layer: Measured) -> list[float]:
    """Of each of FORMS."""
    of_zeros = dict(zip(SHARES, (0.0, *layer.errors), strict=False))
    of_grids: dict[Values | None, float] = {None: 0.0}
    of_grids |= dict(zip(GRIDS, layer.errors[len(SHARES) - 1 :], strict=True))
    of_grids |= {fine: of_grids[coarse] / 256 for fine, coarse in zip(FINE, GRIDS, strict=False)}
    return [of_zeros[form.zeros] + of_grids[form.values] for form in FORMS]


def _pruned(weight: Tensor, statistics: Statistics, *, zeros: float) -> Tensor:
    return SparseGPT().solve(weight, statistics, Unstructured(zeros)).weight


def _rounded(weight: Tensor, statistics: Statistics, *, values: Values) -> Tensor:
    return Rounding(values).solve(weight, statistics, Unstructured(0.0)).weight
