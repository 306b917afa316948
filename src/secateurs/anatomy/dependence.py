"""What the channels of a tensor are made of, asked of autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor


def leaves_of(tensor: Tensor) -> dict[int, Tensor]:
    """The leaves of autograd that a tensor was computed from, by their `id`."""
    if tensor.grad_fn is None:
        return {id(tensor): tensor} if tensor.requires_grad else {}
    leaves: dict[int, Tensor] = {}
    seen, waiting = {tensor.grad_fn}, [tensor.grad_fn]
    while waiting:
        for before, _ in waiting.pop().next_functions:
            if before is None or before in seen:
                continue
            seen.add(before)
            waiting.append(before)
            if hasattr(before, "variable"):
                leaves[id(before.variable)] = before.variable
    return leaves


def pulled_back(tensor: Tensor, leaf: Tensor, weights: Tensor) -> Tensor:
    """The gradient, with respect to a leaf, of a tensor's sum weighted by `weights`; of the leaf's shape."""
    [gradient] = torch.autograd.grad(tensor, leaf, weights, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient.nan_to_num()


def mixes_tokens(tensor: Tensor, leaf: Tensor) -> bool:
    """Whether what a tensor (..., channels) holds of its last token comes from other tokens of a leaf (...,
    rows)."""
    last = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    last.view(-1, tensor.shape[-1])[-1] = _random(tensor.shape[-1])
    felt = (pulled_back(tensor, leaf, last).reshape(-1, leaf.shape[-1]) != 0).any(1)
    return bool(felt[:-1].any()) if len(felt) > 1 else False


@dataclass(frozen=True)
class Owners:
    """Which part of a tensor each row of a leaf goes into."""

    part: Tensor
    """(rows,): the number of the part, or -1 for a row that goes into none."""
    apart: bool
    """Whether no row goes into more than one part."""


def owners(tensor: Tensor, leaf: Tensor, labels: Tensor, rows: int | None = None) -> Owners:
    """Ask which part of a tensor each row of a leaf goes into, at any token.

    The parts' numbers are spelled in bits, so that it takes two backward passes for each bit and not one for
    each part.

    Args:
        tensor: (..., channels).
        leaf: (..., rows).
        labels: (channels,), the part that each channel belongs to, from 0.
        rows: of the leaf, where they lie in more than its last dimension.
    """
    rows = rows or leaf.shape[-1]

    def felt(chosen: Tensor) -> Tensor:
        weights = torch.where(chosen, _random(*tensor.shape), 0)
        return (pulled_back(tensor, leaf, weights).reshape(-1, rows) != 0).any(0)

    used = felt(torch.ones_like(labels, dtype=torch.bool))
    part = torch.zeros(rows, dtype=torch.long)
    apart = torch.ones(rows, dtype=torch.bool)
    for bit in range(max(1, int(labels.max()).bit_length())):
        on = (labels >> bit & 1).bool()
        ones, zeros = felt(on), felt(~on)
        part += ones.long() << bit
        apart &= ~(ones & zeros)
    return Owners(part.masked_fill(~used, -1), bool(apart[used].all()))


def factor_of(result: Tensor, leaf: Tensor) -> float | None:
    """c where a result is c times a leaf plus what does not depend on it; None where it is nothing so
    plain."""
    if result.numel() != leaf.numel():
        return None
    weights = _random(*result.shape)
    gradient = pulled_back(result, leaf, weights).reshape(result.shape)
    factor = float((gradient * weights).sum() / weights.square().sum())
    plain = torch.allclose(gradient, factor * weights, rtol=1e-4, atol=1e-5)
    return round(factor, 6) if plain and factor else None


def _random(*shape: int) -> Tensor:
    """From 1 to 2, so that sums of products with them vanish only where all products do."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 1
