"""How far a model's predictions and hidden states are from another's, and the gradients of that.

At every position: KL(dense || pruned) over the whole vocabulary, in float32. With a large vocabulary the
logits are the largest tensors of a step, so only a few positions are in float32 beside them at any time, and
the gradient is written where the pruned model's logits were: of tensors as large as they are, memory holds
them and the dense model's, in the dtypes that the models gave them. Of what blocks give it holds likewise
the two models' own tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 16
"""Positions at once on a CPU: a few MB in float32, which stay in its cache. Larger tensors would be new pages
of memory each time, which cost more than what is computed."""

CHUNK_ON_GPU = 256
"""A quarter of a GB in float32 with a vocabulary of 256k."""


def divergence(logits: Tensor, wanted: Tensor, ids: Tensor, *, text: float = 0.0) -> Tensor:
    """Mean over all positions of (1 - text) KL(dense || pruned) + text * cross-entropy with the text.

    A sequence's last position has no next token in the text: there it is the KL alone.

    Args:
        logits: (batch, length, vocabulary) of the pruned model, its own: where they have a gradient they are
            overwritten.
        wanted: (batch, length, vocabulary) of the dense model. Where one vocabulary is larger, what is beyond
            the other is padding and does not count.
        ids: (batch, length), the text.
        text: weight of the text itself, in [0, 1].

    Returns:
        A scalar, float32.
    """
    mean: Tensor = _Divergence.apply(logits, wanted, ids, text)
    return mean


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, ids: Tensor, text: float) -> Tensor:
        # The same memory and count of versions: if whoever made the logits needs them, autograd will say so.
        place = logits.detach()
        size = min(logits.shape[-1], wanted.shape[-1])
        chunk = CHUNK if logits.device.type == "cpu" else CHUNK_ON_GPU
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for row, row_wanted, tokens in zip(place, wanted, ids, strict=True):
            following = torch.cat([tokens[1:], tokens[:1]])
            weights = torch.full_like(tokens, text, dtype=torch.float32)
            weights[-1] = 0
            for start in range(0, len(tokens), chunk):
                part = slice(start, start + chunk)
                given = row[part, :size].float().log_softmax(dim=-1)
                target = row_wanted[part, :size].float().log_softmax(dim=-1)
                weight, token = weights[part, None], following[part, None]
                share = target.exp()
                # What the dense model rules out adds nothing, though its logarithm is infinite.
                terms = torch.where(share > 0, share * (target - given), 0)
                total += ((1 - weight) * terms.sum(dim=-1, keepdim=True)).sum()
                total -= (weight * given.gather(1, token)).where(weight > 0, 0).sum()
                if ctx.needs_input_grad[0]:
                    gradient = given.exp().sub_(share.mul_(1 - weight)).scatter_add_(1, token, -weight)
                    row[part, :size] = gradient.div_(ids.numel())
                    row[part, size:] = 0
        ctx.gradient = place
        return total / ids.numel()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient.mul_(above), None, None, None


def states_error(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over blocks and positions of |given - wanted|^2 / |wanted|^2.

    Kurtic et al. (arXiv 2310.06927) have it as SquareHead, with one norm for all positions. With one for
    each, tokens whose states are a thousand times as large as others', a text's first, are not all of it. A
    position where nothing is wanted does not count.

    Args:
        given: of each block of the pruned model (batch, length, hidden).
        wanted: of the dense model, likewise.

    Returns:
        A scalar, float32.
    """
    errors = [_StatesError.apply(*pair) for pair in zip(given, wanted, strict=True)]
    return torch.stack(errors).mean()


class _StatesError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, wanted: Tensor) -> Tensor:
        ctx.save_for_backward(given, wanted)
        difference, scale = _compared(given, wanted)
        return (difference.square_().sum(dim=-1) * scale).sum()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        given, wanted = ctx.saved_tensors
        difference, scale = _compared(given, wanted)
        return difference.mul_((2 * above * scale)[..., None]).to(given.dtype), None


def _compared(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """given - wanted, and 1 / |wanted|^2 over the number of positions, (batch, length), float32."""
    wanted = wanted.float()
    energy = wanted.square().sum(dim=-1)
    scale = torch.where(energy > 0, 1 / (energy * energy.numel()), 0)
    return given.float() - wanted, scale
