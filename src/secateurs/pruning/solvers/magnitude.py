"""Magnitude pruning: the smallest weights go, whatever the inputs are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.pattern import Pattern
from secateurs.pruning.solvers.solver import Solution, finished, working_dtype
from secateurs.pruning.solvers.statistics import Statistics


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest |W_ij| of a layer. Weights that stay do not change."""

    @torch.no_grad()
    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        """See `Solver.solve`. The statistics are not read."""
        weight = weight.to(working_dtype(weight))
        return Solution(finished(weight * pattern.keep(weight.abs())))
