"""Wanda (Sun et al., arXiv 2306.11695, section 3): weights matter by their size times that of their input."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.pattern import Pattern
from secateurs.pruning.solvers.solver import Solution, finished, working_dtype
from secateurs.pruning.solvers.statistics import Statistics


@dataclass(frozen=True)
class Wanda:
    """Keep the largest |W_ij| sqrt(H_jj) of each output. Weights that stay do not change."""

    @torch.no_grad()
    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        """See `Solver.solve`."""
        weight = weight.to(working_dtype(weight))
        keep = pattern.keep(weight.abs() * statistics.norms.to(weight.dtype), group="row")
        return Solution(finished(weight * keep))
