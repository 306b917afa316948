"""An allocation by measured error: sparsity goes where it harms the residual stream least.

Each layer is pruned alone, at several sparsities, and how far its block's output moves (`measured`) is what
counts. The errors of different layers are taken to add up, and their sum is made the least that the budget
allows (`spend`, `choose`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
from torch import Tensor

from secateurs.budget import choose, kept, levels_around, most_zeros, spend, zeros
from secateurs.pattern import NM, Pattern, Unstructured
from secateurs.pruning.allocation.measured import measured
from secateurs.pruning.allocation.survey import Patterns, Survey
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.pruning.solvers.wanda import Wanda

MEASURED = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Sparsities at which errors are measured, as far as a layer may go; then the most that it may have."""

STEP = 0.01
"""Between the sparsities that a layer may get. Their errors are interpolated by the logarithm."""

SOLVER = Wanda()
"""Prunes for the measurement: it costs less than the forward pass of a block."""


@dataclass(frozen=True)
class Sensitivity:
    """Share the budget out so that the measured errors add up to the least.

    Args:
        tokens: of the calibration text on which errors are measured; whole sequences, at least one.

    Raises:
        ValueError: tokens below 1.
    """

    tokens: int = 1024

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"sensitivity's tokens must be at least 1, not {self.tokens}")

    def allocate(self, survey: Survey, budget: Pattern) -> Patterns:
        """See `Allocator.allocate`."""
        if isinstance(budget, NM):
            levels = levels_around(budget)
            sizes, errors = self._measure(survey, [kept(n, budget.m) for n in levels])
            chosen = choose(errors, levels, list(sizes.values()), budget.n)
            return {name: kept(n, budget.m) for name, n in zip(sizes, chosen, strict=True)}
        most = most_zeros(budget.sparsity)
        shares = [*(share for share in MEASURED if share < most), most]
        sizes, errors = self._measure(survey, [Unstructured(share) for share in shares])
        fine = [*np.arange(0, most, STEP).tolist(), most]
        counts = [[min(round(share * size), size - 1) for share in fine] for size in sizes.values()]
        costs = [interpolate(fine, shares, own) for own in errors]
        zeroed = spend(counts, costs, round(budget.sparsity * sum(sizes.values())))
        return {name: zeros(count, size) for (name, size), count in zip(sizes.items(), zeroed, strict=True)}

    def _measure(
        self, survey: Survey, patterns: Sequence[Pattern | None]
    ) -> tuple[dict[str, int], list[list[float]]]:
        """Every layer's size by name, and its error under each of the patterns."""
        attempts = [None if pattern is None else partial(_pruned, pattern=pattern) for pattern in patterns]
        layers = measured(survey, self.tokens, attempts)
        return {name: prod(layer.shape) for name, layer in layers.items()}, [
            layer.errors for layer in layers.values()
        ]


def _pruned(weight: Tensor, statistics: Statistics, *, pattern: Pattern) -> Tensor:
    return SOLVER.solve(weight, statistics, pattern).weight


def interpolate(at: Sequence[float], shares: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Errors at other shares, by their logarithms; below the first share, proportional to the share."""
    logarithms = np.log(np.maximum(errors, np.finfo(np.float64).tiny))
    first = [share / shares[0] for share in at]
    return (np.exp(np.interp(at, shares, logarithms)) * np.minimum(first, 1)).tolist()
