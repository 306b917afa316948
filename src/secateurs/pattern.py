"""Which weights may stay: a share of each layer, or n of every m inputs.

A pattern turns scores into a keep-mask and knows nothing of where scores come from. Of equal scores the
earlier one is kept, so that a mask depends on nothing but its scores.
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch
from torch import Tensor

SAMPLE = 4096
"""Values that tell roughly where a threshold lies."""

Group = Literal["layer", "row"]
"""What competes for the places of an unstructured pattern: all weights of a layer, or those of one output."""


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere.

    Args:
        sparsity: share of zeros, at least 0 and below 1.

    Raises:
        ValueError: the share is outside that range.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is a share of zeros, at least 0 and below 1, not {self.sparsity}")

    def __str__(self) -> str:
        return f"{(Decimal(repr(self.sparsity)) * 100).normalize():f}%"

    def keep(self, scores: Tensor, *, group: Group = "layer") -> Tensor:
        """Keep the highest scores.

        Args:
            scores: (out, in), float32 or float64.
            group: where exactly `round(sparsity * size)` weights fall.

        Returns:
            (out, in), bool: True where the weight stays.
        """
        rivals = scores.reshape(1, -1) if group == "layer" else scores
        size = rivals.shape[1]
        pruned = round(self.sparsity * size)
        if pruned == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        if group == "layer":
            threshold = kth_smallest(rivals[0], pruned)
        else:
            threshold = rivals.kthvalue(pruned, dim=1, keepdim=True).values
        keep = rivals > threshold
        places = size - pruned - keep.sum(dim=1, keepdim=True)
        if places.any():  # more scores equal the threshold than fall
            tied = rivals == threshold
            keep |= tied & (tied.cumsum(dim=1) <= places)
        return keep.reshape(scores.shape)

    def check_width(self, name: str, width: int) -> None:
        """Any width will do."""


@dataclass(frozen=True)
class NM:
    """Keep n of every m consecutive inputs of each output.

    Some papers count the zeros instead: their 3:4 is 1:4 here.

    Args:
        n: weights kept in each group.
        m: inputs in each group, above n.

    Raises:
        ValueError: not 1 <= n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"n:m keeps n of every m inputs with 1 <= n < m, which {self.n}:{self.m} does not"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.n / self.m

    def keep(self, scores: Tensor, *, group: Group = "layer") -> Tensor:
        """Keep the n highest scores of every m.

        Args:
            scores: (out, in), float32 or float64.
            group: has no effect here: the rivals are always the m consecutive inputs.

        Returns:
            (out, in), bool: True where the weight stays.

        Raises:
            ValueError: `in` is not a multiple of m.
        """
        self.check_width("the weight", scores.shape[1])
        members = scores.unflatten(1, (-1, self.m)).unbind(-1)
        keep = torch.empty(
            scores.shape[0], len(members[0][0]), self.m, dtype=torch.bool, device=scores.device
        )
        for i, score in enumerate(members):
            # Counting who is ahead is many times faster than sorting groups this small.
            ahead = torch.zeros_like(score, dtype=torch.int16)
            for j, rival in enumerate(members):
                if j != i:
                    ahead += rival >= score if j < i else rival > score
            torch.lt(ahead, self.n, out=keep[..., i])
        return keep.flatten(1)

    def check_width(self, name: str, width: int) -> None:
        """Refuse a layer whose inputs do not divide into groups.

        Raises:
            ValueError: `width` is not a multiple of m. Names the layer.
        """
        if width % self.m:
            raise ValueError(
                f"{name} has {width} inputs, which is not a multiple of {self.m} as {self} needs"
            )


@dataclass(frozen=True, eq=False)
class Mask:
    """These places and no others, whatever the scores.

    Args:
        kept: (out, in), bool.
    """

    kept: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Mask":
        """Where a weight (out, in) is not 0. All of it, if less than a hundredth is 0: no one meant that."""
        kept = weight != 0
        return cls(kept if (~kept).float().mean() >= 0.01 else torch.ones_like(kept))

    def __str__(self) -> str:
        return "mask"

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - int(self.kept.count_nonzero()) / self.kept.numel()

    def keep(self, scores: Tensor, *, group: Group = "layer") -> Tensor:
        """The mask."""
        return self.kept

    def check_width(self, name: str, width: int) -> None:
        """It is that of the mask."""


Pattern = Unstructured | NM | Mask


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """What `values.kthvalue(k)` finds, sooner where there are many.

    A sample says between which two values it lies, and only those between them are searched; where the sample
    is wrong, which the counts show, all are.

    Args:
        values: (n,), float32 or float64.
        k: from 1 to n.

    Returns:
        A scalar.
    """
    if len(values) >= 16 * SAMPLE:
        sample = values[:: len(values) // SAMPLE | 1].contiguous()
        rank = k * len(sample) // len(values)
        margin = 2 * math.isqrt(len(sample))  # four standard deviations of a rank in the sample, or more
        low = sample.kthvalue(rank - margin).values if rank > margin else -math.inf
        high = sample.kthvalue(rank + margin).values if rank + margin <= len(sample) else math.inf
        within = values[(values >= low) & (values <= high)]
        left = k - int((values < low).count_nonzero())
        if 0 < left <= len(within):
            return within.kthvalue(left).values
    return values.kthvalue(k).values


def parse_pattern(text: str) -> Pattern:
    """Read a pattern as people write it: "70%", "0.7" or "2:4".

    Raises:
        ValueError: anything else, or a share of zeros that is not between 0 and 1.
    """
    examples = "give a share of zeros such as 70% or 0.7, or n:m such as 2:4, which keeps 2 of every 4 inputs"
    text = text.strip()
    if groups := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = map(int, groups.groups())
        if not 1 <= n < m:
            raise ValueError(f"pattern '{text}' does not satisfy 1 <= n < m: {examples}")
        return NM(n, m)
    if (sparsity := share_of(text)) is not None:
        if not 0 < sparsity < 1:
            raise ValueError(f"pattern '{text}' is a sparsity outside (0, 1): {examples}")
        return Unstructured(sparsity)
    raise ValueError(f"'{text}' is not a pattern: {examples}")


def share_of(text: str) -> float | None:
    """Read a share as people write it, "70%" or "0.7"; None for what is none. It may be above 1."""
    text = text.strip()
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?\s*(%?)", text)
    return None if number is None else float(Decimal(text.rstrip("% ")) / (100 if number[3] else 1))
