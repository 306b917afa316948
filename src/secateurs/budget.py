"""Spend a budget of zeros over layers, to the last weight: arithmetic on sizes and costs."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secateurs.pattern import NM, Pattern, Unstructured

BISECTIONS = 200


def fill(wanted: Sequence[float], sizes: Sequence[int], total: int, *, most: float) -> list[int]:
    """Counts that add up to a total, near the shares that are wanted.

    All shares are shifted by the same amount, within 0 and `most`, until they make the total; what rounding
    leaves over goes to the largest fractions.

    Args:
        wanted: share of each item that is to fall; any number.
        sizes: of the items.
        total: sum of the counts, at least 0 and at most `sum(floor(most * size))`.
        most: largest share of an item that may fall, below 1.

    Returns:
        A count for each item.
    """
    share, size = np.array(wanted, dtype=np.float64), np.array(sizes, dtype=np.float64)
    top = np.floor(most * size)
    assert 0 <= total <= int(top.sum())
    low, high = -float(share.max()), most - float(share.min())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if float(np.clip((share + middle) * size, 0, top).sum()) < total:
            low = middle
        else:
            high = middle
    exact = np.clip((share + high) * size, 0, top)
    counts = np.floor(exact)
    left_over = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left_over]] += 1
    assert int(counts.sum()) == total
    return [int(count) for count in counts]


def spend(counts: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], total: int) -> list[int]:
    """Counts that add up to a total at the least cost, where what lies between two candidates may be had too.

    Each item's cost is taken for the lower convex hull of its candidates. Then the cheapest steps along the
    hulls come first (the Lagrange multiplier is the price of the last one), which is optimal; all items but
    one end on a candidate.

    Args:
        counts: of each item, its candidates, rising.
        costs: of each candidate.
        total: sum of the counts; between the sum of the first candidates and that of the last.

    Returns:
        A count for each item.
    """
    chosen = [candidates[0] for candidates in counts]
    steps = []
    for item, (candidates, prices) in enumerate(zip(counts, costs, strict=True)):
        corners = _hull(candidates, prices)
        for left, right in itertools.pairwise(corners):
            width = candidates[right] - candidates[left]
            steps.append(((prices[right] - prices[left]) / width, item, left, width))
    left_over = total - sum(chosen)
    for _, item, _, width in sorted(steps):
        taken = min(width, left_over)
        chosen[item] += taken
        left_over -= taken
    assert left_over == 0, "the total is out of the candidates' reach"
    return chosen


def _hull(x: Sequence[int], y: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull's corners, from left to right."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return corners


def choose(
    costs: Sequence[Sequence[float]], levels: Sequence[int], sizes: Sequence[int], level: int
) -> list[int]:
    """A level for each item so that the total is that of one level for all, at the least cost.

    A multiple-choice knapsack, solved exactly by dynamic programming over the totals that can be reached, in
    units of the sizes' common divisor.

    Args:
        costs: of each item at each level.
        levels: whole numbers, rising; an item at level n counts n times its size.
        sizes: of the items.
        level: one of `levels`: `sum(chosen * size)` is to be `level * sum(sizes)`.

    Returns:
        A level for each item.
    """
    unit = math.gcd(*sizes)
    total = level * sum(sizes) // unit
    best: NDArray[np.float64] = np.full(total + 1, np.inf)
    best[0] = 0
    came_by: list[NDArray[np.uint8]] = []
    for prices, size in zip(costs, sizes, strict=True):
        reached = np.full_like(best, np.inf)
        by = np.zeros(total + 1, dtype=np.uint8)
        for index, (price, weight) in enumerate(zip(prices, levels, strict=True)):
            step = weight * size // unit
            if step <= total:
                cost = best[: total + 1 - step] + price
                better = cost < reached[step:]
                reached[step:][better] = cost[better]
                by[step:][better] = index
        best = reached
        came_by.append(by)
    chosen = []
    for by, size in zip(reversed(came_by), reversed(sizes), strict=True):
        chosen.append(levels[by[total]])
        total -= chosen[-1] * size // unit
    return chosen[::-1]


def afford(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], total: int) -> list[int] | None:
    """One of its candidates for each item, all together within a total, at a low cost.

    As in `spend` the steps along the hulls are taken in the order of their price, each as a whole where it
    fits; what is left over then buys single steps as long as one fits. Where giving all items the same
    candidate is within the total and better, that is chosen.

    Args:
        sizes: of each item's candidates, in any order.
        costs: of each candidate.
        total: what the chosen sizes add up to at most.

    Returns:
        The place of each item's candidate; None if even the smallest are too large together.
    """
    chosen, steps = [], []
    for item, (own, prices) in enumerate(zip(sizes, costs, strict=True)):
        order = sorted(range(len(own)), key=lambda i: (own[i], prices[i]))
        corners = [order[i] for i in _hull([own[i] for i in order], [prices[i] for i in order])]
        # Sizes that are alike come best first, and what costs more for more is no step.
        chosen.append(corners[0])
        for left, right in itertools.pairwise(corners):
            if own[right] > own[left] and prices[right] < prices[left]:
                steps.append(((prices[right] - prices[left]) / (own[right] - own[left]), item, left, right))
    left_over = total - sum(own[i] for own, i in zip(sizes, chosen, strict=True))
    if left_over < 0:
        return None
    for _, item, left, right in sorted(steps):
        width = sizes[item][right] - sizes[item][left]
        if chosen[item] == left and width <= left_over:
            chosen[item] = right
            left_over -= width
    while True:
        singles = [
            ((costs[item][i] - costs[item][now]) / (sizes[item][i] - sizes[item][now]), item, i)
            for item, now in enumerate(chosen)
            for i in range(len(sizes[item]))
            if 0 < sizes[item][i] - sizes[item][now] <= left_over and costs[item][i] < costs[item][now]
        ]
        if not singles:
            break
        _, item, i = min(singles)
        left_over -= sizes[item][i] - sizes[item][chosen[item]]
        chosen[item] = i

    def cost(choice: Sequence[int]) -> float:
        return sum(prices[i] for prices, i in zip(costs, choice, strict=True))

    alike = [[i] * len(sizes) for i in range(min(map(len, sizes)))]
    within = [one for one in alike if sum(own[i] for own, i in zip(sizes, one, strict=True)) <= total]
    return min([chosen, *within], key=cost)


def most_zeros(sparsity: float) -> float:
    """The largest share of a layer that may fall: a tenth of what the budget would leave stays everywhere."""
    return 1 - (1 - sparsity) / 10


def zeros(count: int, size: int) -> Pattern | None:
    """The pattern of so many zeros in a layer of that size, as the shortest decimal share; None for none."""
    if count == 0:
        return None
    digits = 1
    while round(round(count / size, digits) * size) != count:
        digits += 1
    return Unstructured(round(count / size, digits))


def kept(n: int, m: int) -> Pattern | None:
    """n:m, or None if that keeps everything."""
    return NM(n, m) if n < m else None


def levels_around(budget: NM) -> list[int]:
    """The n that layers may get where n:m is the budget: up to two more and two fewer of every m."""
    return list(range(max(1, budget.n - 2), min(budget.m, budget.n + 2) + 1))
