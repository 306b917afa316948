"""The Triton sweep against the torch one, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from problems import correlated_inputs, weight_of

from secateurs.pattern import NM, Unstructured
from secateurs.pruning.solvers import sparsegpt, sweep
from secateurs.pruning.solvers.statistics import Statistics

pytest.importorskip("triton")
from secateurs.pruning.solvers import sweep_triton

PATTERNS = [Unstructured(0.7), Unstructured(0.0), NM(2, 4), NM(4, 8), NM(1, 3), NM(3, 5), NM(1, 2)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def block_of(columns: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and inverse as the sweep gets them for one block."""
    inverse = Statistics.from_inputs(correlated_inputs(2 * columns, columns)).factor(0.01).inverse()
    return weight_of(outputs, columns).T.contiguous().to(DEVICE, dtype), inverse.to(DEVICE, dtype)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("columns", "outputs", "dtype"),
    [(60, 70, torch.float64), (60, 37, torch.float32), (130, 20, torch.float64)],
    ids=str,
)
def test_same_as_torch(pattern, columns, outputs, dtype):
    columns -= columns % getattr(pattern, "m", 1)
    expected, inverse = block_of(columns, outputs, dtype)
    actual = expected.clone()
    sweep.sweep(expected, inverse, pattern)
    sweep_triton.sweep(actual, inverse, pattern)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(actual == 0, expected == 0)


def test_equal_scores_are_settled_alike():
    expected = torch.ones(8, 5, device=DEVICE)
    actual = expected.clone()
    sweep.sweep(expected, torch.eye(8, device=DEVICE), NM(3, 8))
    sweep_triton.sweep(actual, torch.eye(8, device=DEVICE), NM(3, 8))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
def test_a_whole_layer(pattern, monkeypatch):
    weight = weight_of(20, 72).to(DEVICE)
    statistics = Statistics.from_inputs(correlated_inputs(200, 72).to(DEVICE))
    expected = sparsegpt.SparseGPT(block=32).solve(weight, statistics, pattern).weight
    monkeypatch.setattr(sparsegpt, "sweep_for", lambda weight: sweep_triton.sweep)
    actual = sparsegpt.SparseGPT(block=32).solve(weight, statistics, pattern).weight
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
