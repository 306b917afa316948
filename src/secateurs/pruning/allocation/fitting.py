"""What each matrix becomes so that a model fits into so many bytes: how many zeros, how many bits.

Each matrix is pruned alone to several sparsities, and rounded alone to several grids, and how far its block's
output moves (`measured`) is what counts. Zeros and rounding are taken to add up, as different matrices are:
on the bundled model the two together move a block by 0.9 to 1.05 times the sum. Of all choices within the
budget that of the least sum is made (`afford`), and it is compared with the best of those that treat all
matrices alike.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import Tensor

from secateurs.budget import afford
from secateurs.pattern import Unstructured
from secateurs.pruning.allocation.forms import AS_STORED, FINE, FORMS, GRIDS, SHARES, Choice
from secateurs.pruning.allocation.measured import Measured, measured
from secateurs.pruning.allocation.room import Room
from secateurs.pruning.allocation.survey import Survey
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.values import Values

TOKENS = 1024
"""Of the calibration text on which errors are measured."""


def measure_forms(survey: Survey, room: Room) -> list[list[float]]:
    """How far blocks' outputs move: of each parameter that can be packed, in each of FORMS.

    Args:
        survey: of the dense model.
        room: that says which parameters these are.

    Raises:
        FloatingPointError: the inputs of a layer hold NaN or Inf; names it.
    """
    pruned = [partial(_pruned, zeros=zeros) for zeros in SHARES[1:]]
    rounded = [partial(_rounded, values=values) for values in GRIDS]
    layers = measured(survey, TOKENS, [*pruned, *rounded])
    return [
        np.sum([_costs(layers[name]) for name in parameter.matrices], axis=0).tolist()
        for parameter in room.parameters
    ]


def choose_forms(room: Room, costs: Sequence[Sequence[float]]) -> Choice:
    """The forms of the least cost together that there is room for.

    Args:
        room: that the matrices have, once it was checked.
        costs: see `measure_forms`.
    """
    chosen = afford(room.sizes, costs, room.total - room.rest)
    assert chosen is not None, "the room was not checked"
    sizes, errors = np.sum(room.sizes, axis=0), np.sum(costs, axis=0)
    within = [(float(errors[i]), i) for i in range(len(FORMS)) if sizes[i] <= room.total - room.rest]
    uniform_error, uniform = min(within, default=(None, None))
    forms = {
        name: FORMS[i]
        for parameter, i in zip(room.parameters, chosen, strict=True)
        for name in parameter.matrices
    }
    return Choice(
        {**dict.fromkeys(room.others, AS_STORED), **forms},
        room.total,
        room.rest + sum(own[i] for own, i in zip(room.sizes, chosen, strict=True)),
        sum(own[i] for own, i in zip(costs, chosen, strict=True)),
        None if uniform is None else FORMS[uniform],
        uniform_error,
    )


def _costs(layer: Measured) -> list[float]:
    """Of each of FORMS."""
    of_zeros = dict(zip(SHARES, (0.0, *layer.errors), strict=False))
    of_grids: dict[Values | None, float] = {None: 0.0}
    of_grids |= dict(zip(GRIDS, layer.errors[len(SHARES) - 1 :], strict=True))
    # Steps of 8 bits are a sixteenth of those of 4, which come first, and so is the root of the error.
    of_grids |= {fine: of_grids[coarse] / 256 for fine, coarse in zip(FINE, GRIDS, strict=False)}
    return [of_zeros[form.zeros] + of_grids[form.values] for form in FORMS]


def _pruned(weight: Tensor, statistics: Statistics, *, zeros: float) -> Tensor:
    return SparseGPT().solve(weight, statistics, Unstructured(zeros)).weight


def _rounded(weight: Tensor, statistics: Statistics, *, values: Values) -> Tensor:
    return Rounding(values).solve(weight, statistics, Unstructured(0.0)).weight
