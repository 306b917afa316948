"""Choosing units: sizes, proportions, and budgets that layers share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.training.selection import FLOOR, SELECTIONS, select, share_out


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 4), st.integers(1, 20), st.data(), st.sampled_from(SELECTIONS), st.booleans())
def test_every_group_keeps_as_many(groups: int, size: int, data: st.DataObject, how: str, dead: bool) -> None:
    keep = data.draw(st.integers(1, size))
    scores = torch.rand(groups, size, generator=seeded()) * (0 if dead else 1)
    mask = select(scores, keep, how, seeded())  # type: ignore[arg-type]
    assert mask.shape == scores.shape
    assert mask.sum(1).tolist() == [keep] * groups


def test_topk_keeps_the_highest_scores() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2]])
    assert select(scores, 2, "topk", seeded()).tolist() == [[False, True, True, False]]


def test_sampling_is_successive_and_in_proportion() -> None:
    """Against the closed form of drawing two of three without replacement."""
    scores = torch.tensor([[1.0, 2.0, 5.0]])
    generator = seeded()
    draws = sum(select(scores, 2, "sample", generator).double() for _ in range(20_000)) / 20_000
    p = (scores / scores.sum()).flatten().double()
    expected = [float(p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i)) for i in range(3)]
    assert draws.flatten().tolist() == pytest.approx(expected, abs=0.015)  # four standard deviations


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 12), st.data(), st.sampled_from([1, 8]))
def test_shares_spend_the_budget_above_a_floor(
    layers: int, eighths: int, data: st.DataObject, multiple: int
) -> None:
    size = eighths * multiple
    keep = data.draw(st.integers(1, eighths)) * multiple
    scores = [torch.rand(2, size, generator=seeded(layer)) for layer in range(layers)]
    shares = share_out(scores, keep, multiple)
    assert sum(shares) == keep * layers
    assert all(share % multiple == 0 for share in shares)
    assert all(max(multiple, FLOOR * keep // multiple * multiple) <= share <= size for share in shares)


def test_layers_whose_importance_is_spread_out_keep_more() -> None:
    peaked = torch.tensor([[100.0, *[0.01] * 15]])
    flat = torch.ones(1, 16) * 7
    assert share_out([peaked, flat], keep=8) == [2, 14]
