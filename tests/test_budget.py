"""Budgets against brute force, and to the last weight."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from secateurs import NM, Unstructured
from secateurs.budget import afford, choose, fill, kept, levels_around, spend, zeros

shares = st.floats(-2, 2)
sizes = st.integers(1, 5000)
costs = st.floats(0, 10)


@given(st.lists(st.tuples(shares, sizes), min_size=1, max_size=8), st.floats(0, 0.95), st.data())
def test_fill_makes_the_total_and_shifts_all_alike(
    items: list[tuple[float, int]], most: float, data: Any
) -> None:
    wanted, size = [item[0] for item in items], [item[1] for item in items]
    total = data.draw(st.integers(0, sum(int(most * one) for one in size)))
    counts = fill(wanted, size, total, most=most)
    assert sum(counts) == total
    # What neither end stops has moved by the same amount, up to one weight each.
    free = [
        (count / one - want, 1 / one)
        for count, one, want in zip(counts, size, wanted, strict=True)
        if 1 < count < most * one - 1
    ]
    for (a, width_a), (b, width_b) in itertools.combinations(free, 2):
        assert abs(a - b) <= width_a + width_b + 1e-9
    for count, one in zip(counts, size, strict=True):
        assert 0 <= count <= most * one


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(4, 400), st.lists(costs, min_size=4, max_size=4)), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_spend_is_the_best_there_is(items: list[tuple[int, list[float]]], where: float) -> None:
    """Against the linear programme: a mixture of candidates for each item, with the total as asked."""
    counts = [[0, size // 4, size // 2, size] for size, _ in items]
    prices = [list(cost) for _, cost in items]
    total = round(where * sum(one[-1] for one in counts))
    chosen = spend(counts, prices, total)
    assert sum(chosen) == total
    assert sum(count not in candidates for count, candidates in zip(chosen, counts, strict=True)) <= 1

    def cost_of(item: int, count: int) -> float:
        """The least of all mixtures of two candidates."""
        x, y = counts[item], prices[item]
        return min(
            y[a] if x[a] == x[b] else y[a] + (y[b] - y[a]) * (count - x[a]) / (x[b] - x[a])
            for a, b in itertools.product(range(4), repeat=2)
            if min(x[a], x[b]) <= count <= max(x[a], x[b])
        )

    ones = [[float(row == item) for item in range(len(items)) for _ in range(4)] for row in range(len(items))]
    best = linprog(
        [price for price_list in prices for price in price_list],
        A_eq=[*ones, [float(count) for candidates in counts for count in candidates]],
        b_eq=[*([1.0] * len(items)), float(total)],
    )
    own = sum(cost_of(item, count) for item, count in enumerate(chosen))
    assert own == pytest.approx(best.fun, rel=1e-6, abs=1e-6)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([6, 12, 20, 33]), st.lists(costs, min_size=3, max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 3),
)
def test_choose_is_the_best_there_is(items: list[tuple[int, list[float]]], level: int) -> None:
    size, prices = [item[0] for item in items], [item[1] for item in items]
    levels = [1, 2, 3]

    def total(choice: tuple[int, ...]) -> int:
        return sum(n * one for n, one in zip(choice, size, strict=True))

    def cost(choice: tuple[int, ...]) -> float:
        return sum(price[levels.index(n)] for n, price in zip(choice, prices, strict=True))

    every = itertools.product(levels, repeat=len(items))
    exact = [choice for choice in every if total(choice) == level * sum(size)]
    chosen = tuple(choose(prices, levels, size, level))
    assert chosen in exact
    assert cost(chosen) == pytest.approx(min(map(cost, exact)))


@given(st.integers(1, 10**9), st.data())
def test_a_count_as_the_shortest_share(size: int, data: Any) -> None:
    count = data.draw(st.integers(0, size - 1))
    pattern = zeros(count, size)
    if count == 0:
        assert pattern is None
    else:
        assert isinstance(pattern, Unstructured)
        assert round(pattern.sparsity * size) == count


def test_shares_are_readable() -> None:
    assert str(zeros(655_360, 1_048_576)) == "62.5%"
    assert str(zeros(333, 1000)) == "33.3%"


def test_levels() -> None:
    assert levels_around(NM(2, 4)) == [1, 2, 3, 4]
    assert levels_around(NM(4, 8)) == [2, 3, 4, 5, 6]
    assert levels_around(NM(1, 4)) == [1, 2, 3]
    assert kept(3, 4) == NM(3, 4)
    assert kept(4, 4) is None


candidates = st.lists(st.tuples(st.integers(1, 60), costs), min_size=4, max_size=4)


@settings(max_examples=200)
@given(st.lists(candidates, min_size=1, max_size=5), st.integers(0, 300))
def test_afford_stays_within_the_total(items: list[list[tuple[int, float]]], total: int) -> None:
    """Against all choices: none is found only if there is none, and none that costs much less is missed."""
    size = [[one for one, _ in item] for item in items]
    cost = [[one for _, one in item] for item in items]

    def of(table: list[list[Any]], choice: Any) -> Any:
        return sum(own[i] for own, i in zip(table, choice, strict=True))

    possible = [one for one in itertools.product(range(4), repeat=len(items)) if of(size, one) <= total]
    chosen = afford(size, cost, total)
    assert (chosen is None) == (not possible)
    if chosen is None:
        return
    assert of(size, chosen) <= total
    for i in range(4):
        if of(size, [i] * len(items)) <= total:
            assert of(cost, chosen) <= of(cost, [i] * len(items)) + 1e-9
    # What does not fit is one step of one item; the rest is the linear programme's.
    largest = max(max(own) - min(own) for own in cost)
    assert of(cost, chosen) <= min(of(cost, one) for one in possible) + largest + 1e-9
