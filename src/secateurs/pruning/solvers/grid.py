"""A group of columns on a grid: which scales, and which levels. The reference in torch.

`grid_cpu` does the same, faster; `rounding` picks one of the two.
"""

import torch
from torch import Tensor

from secateurs.pruning.solvers.statistics import live
from secateurs.pruning.solvers.sweep import INNER
from secateurs.values import Values

REFITS = 2
"""Steps of least squares from the best of the scales that are tried, each for the levels that it leads to."""


def trials(values: Values) -> list[float]:
    """The scales that are tried, for a largest weight of 1."""
    ends = {-values.lowest, values.highest}
    signs = (1, -1) if len(ends) > 1 else (1,)  # the whole grid goes further on one side than on the other
    return [sign * (1.1 - 0.075 * i) / max(ends) for sign in signs for i in range(9)]


def choose_scales(weight: Tensor, keep: Tensor, importance: Tensor, values: Values) -> Tensor:
    """Scales for a group of columns.

    Args:
        weight: (columns, out).
        keep: (columns, out), bool.
        importance: (columns,), what a squared error counts.
        values: the grid.

    Returns:
        (out,), of numbers that bfloat16 has.
    """
    counts = keep * importance[:, None]
    largest = (weight * (counts != 0)).abs().amax(0)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)

    def offer(scale: Tensor) -> None:
        nonlocal best, least
        scale = as_stored(scale)
        error = (levels_of(weight, scale, values) * scale).sub_(weight).square_().mul_(counts).sum(0)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)

    for trial in trials(values):
        offer(largest * trial)
    for _ in range(REFITS):
        levels = levels_of(weight, best, values)
        weighed = levels * counts
        offer((weighed * weight).sum(0) / live((weighed * levels).sum(0)))
    return best


def settle(
    weight: Tensor, before: Tensor | None, keep: Tensor, scale: Tensor, push: Tensor, values: Values
) -> None:
    """Round columns in place, one after the other, and let those to the right of each make up for it.

    Args:
        weight: (columns, out): where each column would be best.
        before: (columns, out): what the columns to the right know of it; None for the weight itself.
        keep: (columns, out), bool.
        scale: (out,).
        push: (columns, columns): how column k moves for each unit that column j is lower than before, at
            (j, k) for k > j.
        values: the grid.
    """
    before = weight if before is None else before
    change = torch.empty_like(weight)
    for start in range(0, len(weight), INNER):
        stop = min(start + INNER, len(weight))
        for j in range(start, stop):
            rounded = levels_of(weight[j], scale, values).mul_(scale).mul_(keep[j])
            torch.sub(before[j], rounded, out=change[j])
            weight[j] = rounded
            weight[j + 1 : stop].addr_(push[j, j + 1 : stop], change[j])
        weight[stop:].addmm_(push[start:stop, stop:].T, change[start:stop])


def levels_of(weight: Tensor, scale: Tensor, values: Values) -> Tensor:
    """The nearest levels, (columns, out)."""
    codes = (weight / live(scale)).sub_(values.lowest).div_(values.step).round_()
    return codes.clamp_(0, 2**values.bits - 1).mul_(values.step).add_(values.lowest)


def as_stored(scale: Tensor) -> Tensor:
    """Rounded to bfloat16."""
    return scale.bfloat16().to(scale.dtype)
