"""Magnitude and Wanda against sorting each comparison group by hand."""

import numpy as np
import pytest
import torch
from problems import correlated_inputs, weight_of

from secateurs.pattern import NM, Pattern, Unstructured
from secateurs.pruning.solvers.magnitude import Magnitude
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.pruning.solvers.wanda import Wanda


def zero_lowest(weight: np.ndarray, scores: np.ndarray, pruned: int) -> np.ndarray:
    """A vector without its `pruned` lowest scores."""
    result = weight.copy()
    result[np.argsort(scores, kind="stable")[:pruned]] = 0
    return result


def by_group(weight: np.ndarray, scores: np.ndarray, pattern: Pattern, group: int) -> np.ndarray:
    """Prune each run of `group` weights on its own."""
    pruned = pattern.m - pattern.n if isinstance(pattern, NM) else round(pattern.sparsity * group)
    groups = zip(weight.reshape(-1, group), scores.reshape(-1, group), strict=True)
    return np.stack([zero_lowest(w, s, pruned) for w, s in groups]).reshape(weight.shape)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4), NM(1, 3)], ids=str)
def test_magnitude(pattern):
    weight = weight_of(14, 36)
    group = pattern.m if isinstance(pattern, NM) else weight.numel()
    solution = Magnitude().solve(weight, Statistics.from_inputs(torch.zeros(1, 36)), pattern)
    expected = by_group(weight.numpy(), np.abs(weight.numpy()), pattern, group)
    np.testing.assert_array_equal(solution.weight, expected)
    assert solution.objective == ()


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4), NM(1, 3)], ids=str)
def test_wanda(pattern):
    weight, inputs = weight_of(14, 36), correlated_inputs(200, 36)
    group = pattern.m if isinstance(pattern, NM) else 36
    scores = np.abs(weight.numpy()) * np.linalg.norm(inputs.numpy(), axis=0)
    solution = Wanda().solve(weight, Statistics.from_inputs(inputs), pattern)
    np.testing.assert_array_equal(solution.weight, by_group(weight.numpy(), scores, pattern, group))


@pytest.mark.parametrize("solver", [Magnitude(), Wanda()], ids=lambda solver: type(solver).__name__)
class TestEither:
    def test_half_precision_weights_stay_what_they_were(self, solver):
        weight = weight_of(8, 16).bfloat16()
        before = weight.clone()
        pruned = solver.solve(
            weight, Statistics.from_inputs(correlated_inputs(50, 16).float()), NM(2, 4)
        ).weight
        assert pruned.dtype == torch.float32
        assert torch.equal(weight, before)
        kept = pruned != 0
        assert kept.sum() == 8 * 8
        assert torch.equal(pruned[kept], weight.float()[kept])

    def test_no_sparsity_no_change(self, solver):
        weight = weight_of(8, 16)
        pruned = solver.solve(
            weight, Statistics.from_inputs(correlated_inputs(50, 16)), Unstructured(0.0)
        ).weight
        assert torch.equal(pruned, weight)
        assert pruned.data_ptr() != weight.data_ptr()

    def test_zeros_are_positive(self, solver):
        weight = -weight_of(8, 16).abs()
        weight[0] = -0.0
        pruned = solver.solve(
            weight, Statistics.from_inputs(correlated_inputs(50, 16)), Unstructured(0.5)
        ).weight
        assert not pruned[pruned == 0].signbit().any()

    def test_weights_that_are_not_finite_are_refused(self, solver):
        weight = weight_of(8, 16)
        weight[2, 3] = float("nan")
        with pytest.raises(FloatingPointError, match="NaN or Inf"):
            solver.solve(weight, Statistics.from_inputs(correlated_inputs(50, 16)), Unstructured(0.5))
