"""What every local solver takes and gives: a weight and its input's statistics in, a sparse weight out.

A solver is a frozen dataclass of its settings with one method. It knows tensors, not models.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from secateurs.finite import all_finite
from secateurs.pattern import Pattern
from secateurs.pruning.solvers.statistics import Statistics


class Solution(NamedTuple):
    """What a solver returns."""

    weight: Tensor
    """(out, in), in the dtype it was computed in: float64 for a float64 weight, otherwise float32. Pruned
    weights are +0."""

    objective: tuple[float, ...] = ()
    """Relative reconstruction error (`Statistics.error`) after each iteration; empty if there are none."""

    scales: Tensor | None = None
    """(out, groups), bfloat16, of a solver that rounds (`Rounding`)."""


class Solver(Protocol):
    """A local solver."""

    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        """Prune one linear layer.

        Args:
            weight: (out, in), any floating-point dtype; not modified.
            statistics: of the layer's input, on the same device.
            pattern: which weights may stay.

        Raises:
            FloatingPointError: the weight or the statistics hold NaN or Inf, or the result would.
        """
        ...


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a solver computes."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def finished(weight: Tensor) -> Tensor:
    """The result of a solver, checked, with every zero positive. Works in place.

    Raises:
        FloatingPointError: not all of it is finite.
    """
    if not all_finite(weight):
        raise FloatingPointError(
            "pruning gave NaN or Inf: the weight holds some, or its inputs are out of range"
        )
    return weight.add_(0.0)  # turns -0 into +0


def rounded(weight: Tensor, stored: torch.dtype) -> Tensor:
    """A solver's result in the dtype it will be stored in, with every zero positive.

    What is scored and propagated is rounded first, so that it is what a user will load.

    Raises:
        FloatingPointError: that dtype cannot hold it.
    """
    weight = weight.to(stored) + 0
    if not all_finite(weight):
        raise FloatingPointError(f"pruning gave values that {stored} cannot hold")
    return weight
