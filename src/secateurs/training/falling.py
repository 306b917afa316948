"""What falls at an update of the masks: how many weights of each matrix, and which.

With n:m, the candidates to fall are those outside the best n of every m, the worst first: a schedule in small
steps leads there too.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from secateurs.budget import spend
from secateurs.pattern import NM, Pattern, Unstructured

SAMPLE = 65536
"""Weights of a matrix, at least, that tell what a share of it costs."""

STEP = 0.01
"""Between the shares of a matrix whose costs are looked at."""


def share_out(
    weights: Iterable[Tensor], zeros: Sequence[int], sizes: Sequence[int], share: float, most: float
) -> list[int]:
    """How many zeros each matrix is to have: as many as of all weights together the cheapest are in it.

    Args:
        weights: of each matrix (out, in), float32: what the fall of each weight costs.
        zeros: that each has; it gets no fewer.
        sizes: of the matrices.
        share: of zeros in all of them together.
        most: the largest share in one of them.
    """
    shares = np.append(np.arange(0, most, STEP), most)
    counts, costs = [], []
    for each, size, least in zip(weights, sizes, zeros, strict=True):
        sample = each.flatten()[:: max(1, size // SAMPLE) | 1].sort().values.double().cumsum(0)
        sums = np.append(0, sample.cpu().numpy()) * (size / len(sample))
        counts.append([least, *(int(part * size) for part in shares if int(part * size) > least)])
        costs.append([float(sums[round(count / size * len(sample))]) for count in counts[-1]])
    return spend(counts, costs, max(round(share * sum(sizes)), sum(zeros)))


def choose(
    scores: Tensor, pattern: Pattern, zeros: int, gradient: Tensor | None = None, grow: float = 0.0
) -> Tensor:
    """Which weights of a matrix stay.

    Args:
        scores: (out, in), float32, at least 0: the lowest fall; 0 where a weight is zero.
        pattern: the one to end with. Of n:m, none falls that is among the best n of its m.
        zeros: how many fall, as far as the pattern lets them.
        gradient: (out, in), float32, at least 0, to grow by.
        grow: share of what stays that is dropped in exchange for zeros with the largest gradients.

    Returns:
        (out, in), bool.
    """
    if gradient is None or not grow:
        return _lowest_fall(scores, pattern, zeros, scores > 0)
    everything = torch.ones_like(scores, dtype=torch.bool)
    keep = _lowest_fall(scores, pattern, zeros, everything)
    left = int(keep.sum())
    if not left or not scores.any():
        return keep & (scores > 0)
    fewer = scores.numel() - left + min(round(grow * left), left - 1)
    stays = Unstructured(fewer / scores.numel()).keep(scores.masked_fill(~keep, -1))
    # First what stays, then zeros that have a gradient, and should those not suffice, what was just dropped.
    grows = (scores == 0) & (gradient > 0)
    rank = torch.where(grows, gradient / gradient.max(), scores / scores.max() - 1)
    return _lowest_fall(torch.where(stays, 2, rank), pattern, zeros, everything)


def _lowest_fall(scores: Tensor, pattern: Pattern, zeros: int, may: Tensor) -> Tensor:
    """Which stay, of those that may; what may not is among the lowest."""
    if isinstance(pattern, NM):
        best = pattern.keep(scores)
        # Where fewer than n may stay, some that may not are among the best: they are zeros already.
        zeros = min(zeros - int((best & ~may).sum()), int((~best).sum()))
        scores = scores.masked_fill(best, torch.inf)
    if zeros >= scores.numel():  # a layer that holds nothing
        return torch.zeros_like(scores, dtype=torch.bool)
    return Unstructured(max(zeros, 0) / scores.numel()).keep(scores) & may
