"""The weights that are left, rounded to a grid: GPTQ (Frantar et al., arXiv 2210.17323) under a mask
(SparseGPT, 2301.00774, section 3.5), then coordinate descent (as in QuantEase, 2309.01885).

Columns are rounded from left to right, and what each one loses is made up for by the columns to its right. A
group's scale is chosen when the sweep reaches it, for the weights as they are by then: the one of a few
whose error counts least, each weight's by 1 / U_jj^2, what it costs once the columns after it have done
what they can.

What a weight loses may be made up for by any other only as far as their inputs go together, and not just on
the calibration text. So the second moment is shrunk towards its diagonal. Taken at its word it costs SmolLM2
nearly twice as much, on any text, and gains the bundled model nothing (docs/values.md).

The sweep has every column count on all that follow, also those that the mask then takes away. So passes
follow in which every weight goes to the level that is best given all others, and every scale to what is best
given the levels. They never raise the error.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from secateurs.pattern import Pattern
from secateurs.pruning.solvers import grid, grid_cpu
from secateurs.pruning.solvers.grid import as_stored
from secateurs.pruning.solvers.solver import Solution, finished, working_dtype
from secateurs.pruning.solvers.statistics import Statistics, live
from secateurs.pruning.solvers.sweep import blocks
from secateurs.values import Values


@dataclass(frozen=True)
class Rounding:
    """Round to a grid what a pattern keeps, here of the largest weights: a `Mask`, as a rule.

    Args:
        values: the grid.
        passes: of coordinate descent. Each costs a product of (out, in) by (in, in), as much as the sweep.
        damping: as in `SparseGPT`.
        shrinkage: of the second moment towards its diagonal, a share (`Statistics.shrunk`). At 1 each weight
            is rounded by itself, at the scales that suit those that count most.
    """

    values: Values
    passes: int = 2
    damping: float = 0.01
    shrinkage: float = 0.3

    @torch.no_grad()
    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        """See `Solver.solve`. Every weight is a level times the scale of its group, or +0 where the pattern
        has it."""
        dtype = working_dtype(weight)
        statistics = statistics.shrunk(self.shrinkage)
        factor = statistics.factor(self.damping).to(dtype)
        # (in, out), so that a column of the layer is contiguous.
        target = weight.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
        keep = pattern.keep(weight.abs()).T.contiguous()
        rounded, scales, dead = target.clone(), [], statistics.norms == 0
        kernel = kernel_for(rounded)
        for now, inverse in blocks(rounded, factor, self.values.group):
            diagonal = inverse.diagonal()
            importance = diagonal.square().reciprocal()
            if not dead[now].all():
                importance.masked_fill_(dead[now], 0)
            scales.append(kernel.choose_scales(rounded[now], keep[now], importance, self.values))
            push = inverse / -diagonal[:, None]
            kernel.settle(rounded[now], None, keep[now], scales[-1], push, self.values)
        for _ in range(self.passes):
            self._descend(rounded, target, keep, scales, statistics)
        stored = torch.stack(scales, dim=1).bfloat16()
        exact = self.values.decode(self.values.encode(rounded.T, stored), stored).mul_(keep.T)
        # What encoding would hide.
        return Solution(finished(exact.to(dtype) + 0 * rounded.T), scales=stored)

    def _descend(
        self, rounded: Tensor, target: Tensor, keep: Tensor, scales: list[Tensor], statistics: Statistics
    ) -> None:
        """One pass of coordinate descent on tr(D (H + damping mean(diag H) I) D^T), D = target - rounded."""
        moment = statistics.moment.to(target.dtype)
        ridge = self.damping * moment.diagonal().mean()
        diagonal = live(moment.diagonal() + ridge)
        change = target - rounded
        kernel = kernel_for(rounded)
        for group in range(len(scales)):
            now = slice(group * self.values.group, (group + 1) * self.values.group)
            corner, before, scale = moment[now, now].clone(), rounded[now].clone(), scales[group]
            corner.diagonal().copy_(diagonal[now])
            gap = torch.addmm(change[now], moment[now], change, beta=float(ridge))
            after = torch.addcdiv(before, gap, diagonal[now, None])
            kernel.settle(after, before, keep[now], scale, corner / diagonal[now], self.values)
            # The scale, by least squares.
            gap.addmm_(corner, before.sub_(after))
            levels = after / live(scale)
            gain, curve = (levels * gap).sum(0), (levels * (corner @ levels)).sum(0)
            better = as_stored(scale + gain / live(curve))
            step = better - scale
            better = torch.where((2 * gain - curve * step) * step > 0, better, scale)
            scales[group] = better
            rounded[now] = levels.mul_(better)
            change[now] = target[now] - rounded[now]


def kernel_for(weight: Tensor) -> ModuleType:
    """What rounds columns of such a weight."""
    return grid_cpu if grid_cpu.serves(weight) else grid
