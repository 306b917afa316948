"""Layers to prune: weights, and inputs correlated and scaled like those of a language model."""

import torch
from torch import Tensor


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
