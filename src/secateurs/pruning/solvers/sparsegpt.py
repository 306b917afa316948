"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774, sections 3.2 to 3.4, algorithm 1).

Columns are pruned from left to right, and what each one loses is made up for by the columns to its right.
The paper reads the corrections from U, the upper Cholesky factor of H^-1. Here neither is formed (`blocks`):
a Cholesky factorisation is all that is done at full size. Within a block the sweep is the paper's, on U_bb.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from secateurs.pattern import Mask, Pattern
from secateurs.pruning.solvers import sweep_cpu
from secateurs.pruning.solvers.solver import Solution, finished, working_dtype
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.pruning.solvers.sweep import blocks, sweep, whole_groups


@dataclass(frozen=True)
class SparseGPT:
    """One-shot pruning with second-order corrections.

    Args:
        block: columns among which an unstructured mask is chosen at a time, over all outputs; rounded down to
            a multiple of m for n:m.
        damping: added to the diagonal of H, as a share of its mean. Grows if the factorisation fails.

    Raises:
        ValueError: a setting that is not positive.
    """

    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is a number of columns, not {self.block}")
        if not self.damping > 0:
            raise ValueError(f"damping must be above 0, not {self.damping}")

    @torch.no_grad()
    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        """See `Solver.solve`. The weights of dead inputs (H_jj = 0) become 0."""
        pattern.check_width("the weight", weight.shape[1])
        dtype = working_dtype(weight)
        factor = statistics.factor(self.damping).to(dtype)
        # (in, out), so that a column of the layer is contiguous.
        pruned = weight.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
        pruned[statistics.norms == 0] = 0
        sweep = sweep_for(pruned)
        for now, inverse in blocks(pruned, factor, whole_groups(self.block, pattern)):
            here = Mask(pattern.kept[:, now]) if isinstance(pattern, Mask) else pattern
            sweep(pruned[now], inverse, here)
        return Solution(finished(pruned.T.contiguous()))


def sweep_for(weight: Tensor) -> Callable[[Tensor, Tensor, Pattern], None]:
    """The kernel for a weight (in, out) where there is one, otherwise `sweep`."""
    if weight.is_cuda and find_spec("triton"):
        from secateurs.pruning.solvers import sweep_triton

        return sweep_triton.sweep
    return sweep_cpu.sweep if sweep_cpu.serves(weight) else sweep
