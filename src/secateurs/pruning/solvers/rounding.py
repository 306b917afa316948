"""The weights that are left, rounded to a grid: GPTQ (Frantar et al., arXiv 2210.17323) under a mask (SparseGPT,
2301.00774, section 3.5), then coordinate descent (as in QuantEase, 2309.01885).

Columns are rounded from left to right, and what each one loses is made up for by the columns to its right. A
group's scale is chosen when the sweep reaches it, for the weights as they are by then: the one of a few
whose error counts least, each weight's by 1 / U_jj^2, what it costs once the columns after it have done
what they can.

The sweep has every column count on all that follow, also those that the mask then takes away. So passes
follow in which every weight goes to the level that is best given all others, and every scale to what is best
given the levels. They never raise the error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.pattern import Pattern
from secateurs.pruning.solvers.solver import Solution, finished, working_dtype
from secateurs.pruning.solvers.statistics import Statistics, live
from secateurs.pruning.solvers.sweep import INNER, blocks
from secateurs.values import Values

SHARES = tuple(1.1 - 0.075 * i for i in range(9))
"""Of the scale at which a group's largest weight is at the end of the grid: those that are tried."""

REFITS = 2
"""Steps of least squares from the best of them, each for the levels that the last one led to."""


@dataclass(frozen=True)
class Rounding:
    """Round to a grid what a pattern keeps, here of the largest weights: a `Mask`, as a rule.

    Args:
        values: the grid.
        passes: of coordinate descent. Each costs a product of (out, in) by (in, in), as much as the sweep.
        damping: as in `SparseGPT`.
    """

    values: Values
    passes: int = 2
    damping: float = 0.01

    @torch.no_grad()
    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        """See `Solver.solve`. Every weight is a level times the scale of its group, or +0 where the pattern
        has it."""
        dtype = working_dtype(weight)
        factor = statistics.factor(self.damping).to(dtype)
        # (in, out), so that a column of the layer is contiguous.
        target = weight.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
        keep = pattern.keep(weight.abs()).T.contiguous()
        rounded, scales = target.clone(), []
        dead = statistics.norms == 0
        for now, inverse in blocks(rounded, factor, self.values.group):
            diagonal = inverse.diagonal()
            importance = diagonal.square().reciprocal().masked_fill(dead[now], 0)
            scales.append(_scales(rounded[now], keep[now], importance, self.values))
            push = inverse / -diagonal[:, None]
            _settle(rounded[now], rounded[now], keep[now], scales[-1], push, self.values)
        for _ in range(self.passes):
            self._descend(rounded, target, keep, scales, statistics)
        stored = torch.stack(scales, dim=1).bfloat16()
        return Solution(finished(rounded.T.contiguous()), scales=stored)

    def _descend(
        self, rounded: Tensor, target: Tensor, keep: Tensor, scales: list[Tensor], statistics: Statistics
    ) -> None:
        """One pass of coordinate descent on tr(D (H + damping mean(diag H) I) D^T), D = target - rounded."""
        moment = statistics.moment.to(target.dtype)
        ridge = self.damping * moment.diagonal().mean()
        diagonal = live(moment.diagonal() + ridge)
        change = target - rounded
        for group in range(len(scales)):
            now = slice(group * self.values.group, (group + 1) * self.values.group)
            corner, before, scale = moment[now, now].clone(), rounded[now].clone(), scales[group]
            corner.diagonal().copy_(diagonal[now])
            gap = torch.addmm(change[now], moment[now], change, beta=float(ridge))
            after = torch.addcdiv(before, gap, diagonal[now, None])
            _settle(after, before, keep[now], scale, corner / diagonal[now], self.values)
            # The scale, by least squares.
            gap.addmm_(corner, before.sub_(after))
            levels = after / live(scale)
            gain, curve = (levels * gap).sum(0), (levels * (corner @ levels)).sum(0)
            better = _as_stored(scale + gain / live(curve))
            step = better - scale
            better = torch.where((2 * gain - curve * step) * step > 0, better, scale)
            scales[group] = better
            rounded[now] = levels.mul_(better)
            change[now] = target[now] - rounded[now]


def _scales(weight: Tensor, keep: Tensor, importance: Tensor, values: Values) -> Tensor:
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
    largest = (weight * keep).abs().amax(0)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)

    def offer(scale: Tensor) -> Tensor:
        """Take a scale where it is better; the levels it leads to."""
        nonlocal best, least
        levels = _levels(weight, scale, values)
        error = (levels * scale).sub_(weight).square_().mul_(counts).sum(0)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return levels

    ends = {abs(values.lowest), values.highest}  # on the whole grid one is further out, so a sign matters
    for sign in (1, -1) if len(ends) > 1 else (1,):
        for share in SHARES:
            offer(_as_stored(largest * (sign * share / max(ends))))
    for _ in range(REFITS):
        levels = _levels(weight, best, values)
        weighed = levels * counts
        fitted = (weighed * weight).sum(0) / live((weighed * levels).sum(0))
        offer(_as_stored(fitted))
    return best


def _settle(
    weight: Tensor, before: Tensor, keep: Tensor, scale: Tensor, push: Tensor, values: Values
) -> None:
    """Round columns in place, one after the other, and let those to the right of each make up for it.

    Args:
        weight: (columns, out): where each column would be best.
        before: (columns, out): what the columns to the right know of it; may be `weight` itself.
        keep: (columns, out), bool.
        scale: (out,).
        push: (columns, columns): how column k moves for each unit that column j is lower than before, at
            (j, k) for k > j.
        values: the grid.
    """
    change = torch.empty_like(weight)
    for start in range(0, len(weight), INNER):
        stop = min(start + INNER, len(weight))
        for j in range(start, stop):
            rounded = _levels(weight[j], scale, values).mul_(scale).mul_(keep[j])
            torch.sub(before[j], rounded, out=change[j])
            weight[j] = rounded
            weight[j + 1 : stop].addr_(push[j, j + 1 : stop], change[j])
        weight[stop:].addmm_(push[start:stop, stop:].T, change[start:stop])


def _levels(weight: Tensor, scale: Tensor, values: Values) -> Tensor:
    """The nearest levels; (..., out) of (..., out)."""
    codes = (weight / live(scale)).sub_(values.lowest).div_(values.step).round_()
    return codes.clamp_(0, 2**values.bits - 1).mul_(values.step).add_(values.lowest)


def _as_stored(scale: Tensor) -> Tensor:
    return scale.bfloat16().to(scale.dtype)
