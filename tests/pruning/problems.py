"""Layers to prune: weights, and inputs correlated and scaled like those of a language model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs import Solution, Statistics
from secateurs.pattern import Pattern


def correlated_inputs(tokens: int, width: int, *, seed: int = 0) -> Tensor:
    """(tokens, width), float64: a decaying spectrum, very different scales, a few outlier features."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -0.6
    inputs = (normal(tokens, width) * spectrum) @ normal(width, width)
    scales = torch.exp(0.5 * normal(width))
    scales[:: max(width // 4, 1)] *= 8
    return inputs * scales


def weight_of(outputs: int, width: int, *, seed: int = 1) -> Tensor:
    """(outputs, width), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, width, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Smallest:
    """A solver simple enough to write twice: zero the smallest |w| times the norm of its input."""

    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        return Solution(smallest(weight, statistics.norms, pattern.sparsity))


def smallest(weight: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    """What that solver does."""
    scores = (weight.abs() * norms).flatten()
    cut = scores.argsort()[: round(sparsity * len(scores))]
    pruned = weight.flatten().clone()
    pruned[cut] = 0
    return pruned.view_as(weight)
