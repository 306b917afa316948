"""ADMM pruning (Boža, arXiv 2401.02938, algorithms 1 and 2) with two additions of ALPS (Meng et al.,
arXiv 2406.07831): a penalty that rises, and a last solve on the fixed mask by conjugate gradients.

The inputs are scaled to unit norm and the weights inversely, so that H becomes the correlations C and the
largest weights are those that Wanda would keep. Over weights W near the dense W0 and Z in the pattern,

    minimise  tr((W - W0) (C + ridge I) (W - W0)^T)  subject to  W = Z

alternates between projecting W + U onto the pattern, at a sparsity that rises to the target, and a ridge
solve for W; U is the scaled dual variable. The ridge pulls towards the dense weights, not towards zero.

Sparsity rises until the last iteration: once the mask is found, conjugate gradients need fewer iterations
than ADMM to find its weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.pattern import NM, Pattern, Unstructured
from secateurs.pruning.solvers.solver import Solution, finished, working_dtype
from secateurs.pruning.solvers.statistics import Statistics, live

RHO = (0.1, 0.3, 1.0)
"""The penalty in each third of the iterations, in units of C's diagonal, which is 1. A low one explores. The
last is no lower because U makes a cut weight look 1 / rho times as large as it is, which would settle on a
wrong mask where inputs are hardly correlated. Each costs one (in, in) inverse, so they are few."""


@dataclass(frozen=True)
class ADMM:
    """Iterative pruning: slower than SparseGPT by an order of magnitude, and closer to the dense layer.

    Memory: three (in, in) inverses stay with the statistics until the layers that share them are done.

    Args:
        iterations: of ADMM, which finds the mask; one product of (out, in) by (in, in) each.
        polish: iterations of conjugate gradients, which then find the weights; the same cost each.
        ridge: weight of staying near the dense weights, as a share of each input's energy.

    Raises:
        ValueError: iterations below 3, polish below 0, or a ridge that is not positive.
    """

    iterations: int = 30
    polish: int = 10
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.iterations < len(RHO):
            raise ValueError(f"ADMM needs at least {len(RHO)} iterations, not {self.iterations}")
        if self.polish < 0:
            raise ValueError(f"polish is a number of iterations, not {self.polish}")
        if not self.ridge > 0:
            raise ValueError(f"ridge must be above 0, not {self.ridge}")

    @torch.no_grad()
    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        """See `Solver.solve`. The weights of dead inputs (H_jj = 0) become 0.

        The objective of the solution is the error once the mask is found and after each iteration of
        conjugate gradients: before that, the sparsity is not yet the target's.
        """
        pattern.check_width("the weight", weight.shape[1])
        dtype = working_dtype(weight)
        norms = statistics.norms.to(dtype)
        moment = statistics.moment.to(dtype)
        divisor = live(norms)

        def correlate(rows: Tensor) -> Tensor:
            """rows @ C, without C in memory."""
            return ((rows / divisor) @ moment).div_(divisor)

        dense = weight.to(dtype) * norms
        masked = self._find_mask(dense, correlate(dense), statistics, pattern)
        polished, objective = self._polish(dense, *masked, correlate)
        return Solution(finished(polished.div_(divisor)), objective)

    def _find_mask(
        self, dense: Tensor, target: Tensor, statistics: Statistics, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """The last ADMM iterate (out, in), in the pattern, and its keep-mask."""
        target = target.add(dense, alpha=self.ridge)
        solution, dual, last_rho = dense, torch.zeros_like(dense), RHO[0]
        for i in range(self.iterations):
            rho = RHO[i * len(RHO) // self.iterations]
            inverse = statistics.ridge_inverse(self.ridge + rho).to(dense.dtype)
            point = dual.mul_(last_rho / rho).add_(solution)
            keep = project(point, pattern, progress=(i + 1) / self.iterations)
            # Z is the point without what is cut, U what is cut, and Z - U the point with that negated.
            dual = point.masked_fill(keep, 0)
            solution = point.sub_(dual, alpha=2).mul_(rho).add_(target) @ inverse
            last_rho = rho
        return solution * keep, keep

    def _polish(
        self, dense: Tensor, sparse: Tensor, keep: Tensor, correlate: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, tuple[float, ...]]:
        """Conjugate gradients on the kept weights of each output; their preconditioner, diag C, is 1."""
        tiny = torch.finfo(dense.dtype).tiny  # divides the zeros of a row that is already solved
        energy = (dense * correlate(dense)).sum()
        gap = correlate(dense - sparse)
        objective = [(dense - sparse).mul_(gap).sum() / energy]
        residual = gap.add(dense - sparse, alpha=self.ridge).mul_(keep)
        direction = residual.clone()
        size = residual.square().sum(dim=1, keepdim=True)
        for _ in range(self.polish):
            image = correlate(direction)
            curved = image.add(direction, alpha=self.ridge)
            step = size / (direction * curved).sum(dim=1, keepdim=True).clamp_min(tiny)
            sparse.addcmul_(step, direction)
            gap.addcmul_(step, image, value=-1)
            residual.addcmul_(step, curved.mul_(keep), value=-1)
            before, size = size, residual.square().sum(dim=1, keepdim=True)
            direction.mul_(size / before.clamp_min(tiny)).add_(residual)
            objective.append((dense - sparse).mul_(gap).sum() / energy)
        # 0 / 0 is a layer without output; below 0 is rounding.
        return sparse, tuple(torch.stack(objective).nan_to_num(0.0).clamp_min(0.0).tolist())


def project(point: Tensor, pattern: Pattern, *, progress: float) -> Tensor:
    """The keep-mask of the largest |point| at sparsity `1 - (1 - progress)^3` times the target's.

    On the way to n:m only those are cut that n:m would cut.
    """
    size = point.abs()
    if isinstance(pattern, NM):
        size.masked_fill_(pattern.keep(size), torch.inf)
    return Unstructured(pattern.sparsity * (1 - (1 - progress) ** 3)).keep(size)
