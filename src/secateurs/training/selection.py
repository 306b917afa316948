"""Which units run: the most important ones, or a sample in proportion to importance.

Scores are (groups, size) per block; every group keeps as many, because the attention's code needs it.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Select = Literal["topk", "sample"]
SELECTIONS: tuple[Select, ...] = get_args(Select)

FLOOR = 0.25
"""The least that a layer keeps when layers share a budget, as a share of what it would keep by itself."""


def select(scores: Tensor, keep: int, how: Select, generator: torch.Generator) -> Tensor:
    """Choose units of one block.

    Args:
        scores: (groups, size) importance, not negative.
        keep: units to keep in each group.
        how: "topk", or "sample": without replacement, each time in proportion to the scores of what is left
            (the Gumbel top-k trick, arXiv 1903.06059).
        generator: of the sample.

    Returns:
        A mask (groups, size), true for what is kept.
    """
    keys = scores.double()
    if how == "sample":
        uniform = torch.rand(scores.shape, dtype=torch.float64, generator=generator)
        # Gumbel noise is -log(-log(u)). A unit that was never active is drawn last, but may be.
        keys = keys.clamp(min=torch.finfo(torch.float64).tiny).log() - (-uniform.log()).log()
    chosen = keys.topk(keep, dim=1).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, chosen, True)


def share_out(scores: Sequence[Tensor], keep: int, multiple: int = 1) -> list[int]:
    """Spend one budget across layers: layers whose importance is spread over many units keep more of them.

    Scores are divided by their layer's mean first, because activations of different layers are not on one
    scale. The units with the highest are kept over all layers, but no layer keeps less than FLOOR of its even
    share.

    Args:
        scores: (groups, size) for each layer.
        keep: what each layer would keep per group if all kept as many.
        multiple: what a layer keeps is one of these.

    Returns:
        Units to keep in each group of each layer: `keep * len(scores)` of them in all, if both are multiples.
    """
    size = scores[0].shape[1]
    # Ranked within a group, because a layer keeps the best of every group.
    ranked = torch.stack(
        [(s / s.mean().clamp(min=1e-30)).sort(1, descending=True).values.mean(0) for s in scores]
    )
    floor = max(multiple, int(FLOOR * keep) // multiple * multiple)
    steps = ranked[:, floor:].unfold(1, multiple, multiple).mean(2) if size > floor else ranked[:, :0]
    extra = max(0, keep - floor) * len(scores) // multiple
    taken = torch.zeros(len(scores), dtype=torch.long)
    best = steps.flatten().topk(min(extra, steps.numel())).indices
    taken.index_add_(0, best // max(1, steps.shape[1]), torch.ones_like(best))
    return [floor + multiple * int(n) for n in taken]
