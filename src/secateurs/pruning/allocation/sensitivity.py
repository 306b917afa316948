"""An allocation by measured error: sparsity goes where it harms the residual stream least.

Errors of layers relative to their own outputs cannot be compared: where half of q's output may be lost
without notice, a tenth of down's may not. So each layer is pruned alone, at several sparsities, and what is
compared is how far that moves the block's output, token by token:

    e_l(s) = mean over tokens t of  |y_t(l pruned to s) - y_t|^2 / |y_t|^2

By the energy of the stream y_t later blocks and the last norm divide, which makes blocks comparable; and
token by token, because a few tokens have most of the energy. The errors of different layers are taken to
add up, and their sum is made the least that the budget allows (`spend`, `choose`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateurs.blockwise import Batch
from secateurs.budget import choose, kept, levels_around, most_zeros, spend, zeros
from secateurs.pattern import NM, Pattern, Unstructured
from secateurs.pruning.allocation.change import Change
from secateurs.pruning.allocation.survey import Patterns, Survey
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
        sizes: dict[str, int] = {}
        errors: list[list[float]] = []
        for block in survey.blocks():
            change = Change(survey.model, block.index, _first(block.hidden, self.tokens))
            found: dict[str, list[float]] = {}
            # Experts first: what is known of them holds on to weights that follow them.
            for layer in sorted(block.layers, key=lambda layer: not change.is_short(layer.name)):
                own = found[layer.name] = []
                dense = layer.weight.clone()
                for pattern in patterns:
                    if pattern is None:
                        own.append(0.0)
                        continue
                    layer.weight.copy_(SOLVER.solve(dense, layer.statistics, pattern).weight)
                    own.append(float(change.of(layer.name).mean()))
                    layer.weight.copy_(dense)
            for layer in block.layers:
                sizes[layer.name] = layer.weight.numel()
                errors.append(found[layer.name])
        return sizes, errors


def interpolate(at: Sequence[float], shares: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Errors at other shares, by their logarithms; below the first share, proportional to the share."""
    logarithms = np.log(np.maximum(errors, np.finfo(np.float64).tiny))
    first = [share / shares[0] for share in at]
    return (np.exp(np.interp(at, shares, logarithms)) * np.minimum(first, 1)).tolist()


def _first(hidden: list[Batch], tokens: int) -> list[Batch]:
    """Sequences that make so many tokens, at least one, in the batches that they come in."""
    left = max(1, tokens // hidden[0].states.shape[-2])
    first = []
    for batch in hidden:
        if left > 0:
            first.append(Batch.joined(batch.split()[:left]))
            left -= len(batch.at)
    return first
