"""OWL (Yin et al., arXiv 2310.05175, section 3.2): where outliers are many, fewer weights fall.

A weight's score is Wanda's, |W_ij| sqrt(H_jj); an outlier is one above M times the mean score. The paper
takes the mean over all layers of a block together, and gives these one sparsity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from secateurs.budget import choose, fill, kept, levels_around, most_zeros, zeros
from secateurs.pattern import NM, Pattern
from secateurs.pruning.allocation.survey import Layer, Patterns, Survey

LEVELS = ("block", "layer")


@dataclass(frozen=True)
class OWL:
    """Share the budget out linearly by the share of outliers.

    As in the published code, the shares of outliers are stretched to a range of densities 2 lambda wide,
    which is then moved to make the total. For n:m each gets an n near that, again with the total exact.

    Args:
        level: what gets a sparsity of its own: "block", as published, or "layer".
        m: an outlier's score, in units of the mean.
        lambda_: half of the range of sparsities. On the command line, lambda.

    Raises:
        ValueError: an unknown level, m not positive, or lambda outside (0, 0.5).
    """

    level: str = "block"
    m: float = 5.0
    lambda_: float = 0.08

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"OWL's level is {' or '.join(LEVELS)}, not '{self.level}'")
        if not self.m > 0:
            raise ValueError(f"OWL's m must be above 0, not {self.m}")
        if not 0 < self.lambda_ < 0.5:
            raise ValueError(f"OWL's lambda must be above 0 and below 0.5, not {self.lambda_}")

    def allocate(self, survey: Survey, budget: Pattern) -> Patterns:
        """See `Allocator.allocate`."""
        members: list[dict[str, int]] = []  # of each block or layer: names and sizes
        outliers: list[float] = []
        for block in survey.blocks():
            for unit in [block.layers] if self.level == "block" else [[layer] for layer in block.layers]:
                members.append({layer.name: layer.weight.numel() for layer in unit})
                outliers.append(outlier_share(unit, self.m))
        width = max(outliers) - min(outliers)
        wanted = [-2 * self.lambda_ * share / width if width else 0.0 for share in outliers]
        sizes = [sum(unit.values()) for unit in members]
        if isinstance(budget, NM):
            shares = [count / size for count, size in zip(_fill(wanted, sizes, budget), sizes, strict=True)]
            levels = levels_around(budget)
            costs = [
                [size * (1 - n / budget.m - share) ** 2 for n in levels]
                for share, size in zip(shares, sizes, strict=True)
            ]
            chosen = choose(costs, levels, sizes, budget.n)
            return {name: kept(n, budget.m) for unit, n in zip(members, chosen, strict=True) for name in unit}
        size_of = {name: size for unit in members for name, size in unit.items()}
        of_layers = [share for unit, share in zip(members, wanted, strict=True) for _ in unit]
        counts = _fill(of_layers, list(size_of.values()), budget)
        return {name: zeros(count, size) for (name, size), count in zip(size_of.items(), counts, strict=True)}


def outlier_share(layers: Sequence[Layer], m: float) -> float:
    """Share of the layers' weights whose score is above m times the mean over all of them."""
    size = sum(layer.weight.numel() for layer in layers)
    mean = sum(float(_scores(layer).sum()) for layer in layers) / size
    return sum(int((_scores(layer) > m * mean).sum()) for layer in layers) / size


def _scores(layer: Layer) -> Tensor:
    return layer.weight.float().abs() * layer.statistics.norms


def _fill(wanted: Sequence[float], sizes: Sequence[int], budget: Pattern) -> list[int]:
    total = round(budget.sparsity * sum(sizes))
    return fill(wanted, sizes, total, most=most_zeros(budget.sparsity))
