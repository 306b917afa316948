"""Patterns against counting, sorting and reading back."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from secateurs.pattern import NM, SAMPLE, Unstructured, kth_smallest, parse_pattern

SHARES = st.floats(0, 1, exclude_max=True)
NS_AND_MS = st.integers(2, 9).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def scores_of(
    rows: st.SearchStrategy[int], columns: st.SearchStrategy[int]
) -> st.SearchStrategy[torch.Tensor]:
    """Few distinct values, so that ties are the rule."""
    shape = st.tuples(rows, columns)
    elements = st.integers(0, 4).map(float)
    kinds = st.sampled_from([np.float32, np.float64])
    return (
        st.tuples(kinds, shape)
        .flatmap(lambda at: arrays.arrays(*at, elements=elements))
        .map(torch.from_numpy)
    )


SCORES = scores_of(st.integers(1, 8), st.integers(1, 40))


def by_sorting(scores: np.ndarray, kept: int) -> np.ndarray:
    """Mask of the `kept` highest of a vector, the earlier first among equals."""
    mask = np.zeros(len(scores), dtype=bool)
    mask[np.argsort(-scores, kind="stable")[:kept]] = True
    return mask


@settings(deadline=None)
@given(SCORES, SHARES)
def test_unstructured_keeps_the_highest_of_a_layer(scores, sparsity):
    keep = Unstructured(sparsity).keep(scores)
    assert keep.dtype == torch.bool
    expected = by_sorting(scores.numpy().ravel(), scores.numel() - round(sparsity * scores.numel()))
    assert (keep.numpy().ravel() == expected).all()


@settings(deadline=None)
@given(SCORES, SHARES)
def test_unstructured_keeps_the_highest_of_a_row(scores, sparsity):
    keep = Unstructured(sparsity).keep(scores, group="row")
    width = scores.shape[1]
    for row, kept in zip(scores.numpy(), keep.numpy(), strict=True):
        assert (kept == by_sorting(row, width - round(sparsity * width))).all()


@settings(deadline=None)
@given(NS_AND_MS, st.data())
def test_nm_keeps_the_highest_of_every_group(n_and_m, data):
    n, m = n_and_m
    scores = data.draw(scores_of(st.integers(1, 6), st.integers(1, 6).map(lambda groups: groups * m)))
    keep = NM(n, m).keep(scores)
    for group, kept in zip(scores.numpy().reshape(-1, m), keep.numpy().reshape(-1, m), strict=True):
        assert (kept == by_sorting(group, n)).all()


def test_a_mask_does_not_depend_on_memory_layout():
    scores = torch.rand(24, 16, generator=torch.Generator().manual_seed(0))
    for pattern in (Unstructured(0.6), NM(2, 4)):
        assert (pattern.keep(scores) == pattern.keep(scores.T.contiguous().T)).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "few values", "one value", "infinite", "sorted", "misleading"])
def test_the_kth_smallest_of_many(kind, share):
    """Against numpy's sort; also where what is sampled is nothing like the rest."""
    values = np.random.default_rng(0).normal(size=20 * SAMPLE).astype(np.float32)
    if kind == "few values":
        values = values.round()
    elif kind == "one value":
        values[:] = 3
    elif kind == "infinite":
        values[: len(values) // 2] = np.inf
    elif kind == "sorted":
        values.sort()
    elif kind == "misleading":
        values[:: len(values) // SAMPLE | 1] = 100
    k = max(round(share * len(values)), 1)
    assert float(kth_smallest(torch.from_numpy(values), k)) == np.sort(values)[k - 1]


def test_sparsity_zero_keeps_everything():
    assert Unstructured(0.0).keep(torch.zeros(3, 5)).all()


@given(SHARES.filter(lambda share: share > 0))
def test_unstructured_reads_back(sparsity):
    assert parse_pattern(str(Unstructured(sparsity))) == Unstructured(sparsity)


@given(NS_AND_MS)
def test_nm_reads_back(n_and_m):
    assert parse_pattern(str(NM(*n_and_m))) == NM(*n_and_m)


def test_pattern_texts():
    assert str(Unstructured(0.7)) == "70%"
    assert str(Unstructured(0.625)) == "62.5%"
    assert str(NM(2, 4)) == "2:4"
    assert parse_pattern("70%") == parse_pattern("0.7") == parse_pattern(" 70 % ") == Unstructured(0.7)
    assert NM(1, 4).sparsity == 0.75


@pytest.mark.parametrize(
    "text",
    ["", "70", "0", "1", "100%", "0%", "-0.5", "nan", "inf", "4:2", "2:2", "0:4", "2:4:8", "half", "1/2"],
)
def test_other_texts_are_refused_in_one_line_with_examples(text):
    with pytest.raises(ValueError, match=r"70%.*2:4") as refused:
        parse_pattern(text)
    assert "\n" not in str(refused.value)
    assert f"'{text}'" in str(refused.value)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_impossible_sparsity_is_refused(sparsity):
    with pytest.raises(ValueError, match="share of zeros"):
        Unstructured(sparsity)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_impossible_nm_is_refused(n, m):
    with pytest.raises(ValueError, match=re.escape(f"{n}:{m}")):
        NM(n, m)


def test_width_is_checked_by_layer_name():
    NM(2, 4).check_width("model.layers.0.mlp.down_proj", 12)
    Unstructured(0.5).check_width("model.layers.0.mlp.down_proj", 13)
    with pytest.raises(ValueError, match=re.escape("model.layers.0.mlp.down_proj has 13 inputs")):
        NM(2, 4).check_width("model.layers.0.mlp.down_proj", 13)
    with pytest.raises(ValueError, match="2:4"):
        NM(2, 4).keep(torch.rand(2, 6))
