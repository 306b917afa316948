"""SparseGPT against the optimal brain surgeon, one column at a time with an explicit inverse."""

import numpy as np
import pytest
import torch
from problems import correlated_inputs, weight_of

from secateurs.pattern import NM, Pattern, Unstructured
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.statistics import Statistics


def naive(
    inputs: np.ndarray, weight: np.ndarray, pattern: Pattern, *, block: int, damping: float
) -> np.ndarray:
    """Eliminates inputs one by one from H^-1 (arXiv 2301.00774, equations 2 to 5)."""
    weight = weight.copy()
    outputs, width = weight.shape
    moment = inputs.T @ inputs / len(inputs)
    dead = np.diag(moment) == 0
    moment += damping * np.diag(moment).mean() * np.eye(width)
    moment[dead, dead] += 1
    weight[:, dead] = 0
    rows_of_inverse = np.zeros((width, width))  # row j is that of the inverse over the inputs from j on
    inverse = np.linalg.inv(moment)
    for j in range(width):
        rows_of_inverse[j] = inverse[j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    keep = np.ones((outputs, width), dtype=bool)
    group = pattern.m if isinstance(pattern, NM) else block
    for j in range(width):
        if j % group == 0:
            stop = min(j + group, width)
            scores = weight[:, j:stop] ** 2 / np.diag(rows_of_inverse)[j:stop]
            if isinstance(pattern, NM):
                for row in range(outputs):
                    keep[row, j + np.argsort(scores[row])[: pattern.m - pattern.n]] = False
            else:
                lowest = np.argsort(scores.ravel())[: round(pattern.sparsity * scores.size)]
                rows, columns = np.unravel_index(lowest, scores.shape)
                keep[rows, j + columns] = False
        for row in range(outputs):
            if not keep[row, j]:
                weight[row, j:] -= weight[row, j] / rows_of_inverse[j, j] * rows_of_inverse[j, j:]
                weight[row, j] = 0
    return weight


def relative_error(inputs: np.ndarray, dense: np.ndarray, sparse: np.ndarray) -> float:
    return float(((inputs @ (dense - sparse).T) ** 2).sum() / ((inputs @ dense.T) ** 2).sum())


@pytest.mark.parametrize(
    ("outputs", "width", "tokens", "block", "pattern"),
    [
        (24, 40, 200, 128, Unstructured(0.7)),
        (24, 40, 200, 16, Unstructured(0.5)),
        (10, 37, 200, 11, Unstructured(0.8)),  # nothing divides anything
        (6, 150, 400, 128, Unstructured(0.7)),  # a second, shorter block
        (1, 37, 200, 128, Unstructured(0.6)),  # one output
        (12, 40, 20, 128, Unstructured(0.7)),  # fewer tokens than inputs
        (12, 40, 200, 128, NM(2, 4)),
        (12, 40, 200, 16, NM(4, 8)),
        (12, 42, 200, 16, NM(1, 3)),
        (12, 40, 20, 8, NM(1, 4)),
        (5, 60, 200, 16, NM(7, 20)),  # groups wider than the block
        (1, 8, 200, 128, NM(2, 4)),
    ],
    ids=str,
)
def test_same_as_column_by_column(outputs, width, tokens, block, pattern):
    inputs, weight = correlated_inputs(tokens, width), weight_of(outputs, width)
    rounded = max(block // pattern.m, 1) * pattern.m if isinstance(pattern, NM) else block
    expected = naive(inputs.numpy(), weight.numpy(), pattern, block=rounded, damping=0.01)
    pruned = SparseGPT(block=block).solve(weight, Statistics.from_inputs(inputs), pattern).weight.numpy()
    np.testing.assert_array_equal(pruned != 0, expected != 0)
    np.testing.assert_allclose(pruned, expected, atol=1e-9)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
def test_dead_inputs(pattern):
    inputs, weight = correlated_inputs(200, 40), weight_of(12, 40)
    inputs[:, [3, 17, 18]] = 0
    expected = naive(inputs.numpy(), weight.numpy(), pattern, block=128, damping=0.01)
    pruned = SparseGPT().solve(weight, Statistics.from_inputs(inputs), pattern).weight.numpy()
    np.testing.assert_allclose(pruned, expected, atol=1e-9)
    assert (pruned[:, [3, 17, 18]] == 0).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
def test_single_precision_loses_nothing_that_matters(pattern):
    """The reconstruction error is within 0.1 % of that in double precision."""
    inputs, weight = correlated_inputs(600, 160), weight_of(48, 160)
    expected = naive(inputs.numpy(), weight.numpy(), pattern, block=128, damping=0.01)
    pruned = SparseGPT().solve(weight.float(), Statistics.from_inputs(inputs.float()), pattern).weight
    assert pruned.dtype == torch.float32
    error = relative_error(inputs.numpy(), weight.numpy(), pruned.double().numpy())
    assert error == pytest.approx(relative_error(inputs.numpy(), weight.numpy(), expected), rel=1e-3)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
def test_independent_inputs_leave_nothing_to_correct(pattern):
    """With a diagonal H the scores are |W_ij| sqrt(H_jj + damping) and weights that stay do not change."""
    moment = torch.linspace(0.5, 4.0, 32, dtype=torch.float64)
    statistics = Statistics.from_inputs((32 * moment).sqrt().diag())
    weight = weight_of(10, 32)
    damped = moment + 0.01 * moment.mean()
    expected = weight * pattern.keep(weight.abs() * damped.sqrt())
    torch.testing.assert_close(
        SparseGPT().solve(weight, statistics, pattern).weight, expected, rtol=0, atol=1e-12
    )


def test_no_sparsity_no_change():
    weight = weight_of(12, 40)
    pruned = (
        SparseGPT()
        .solve(weight, Statistics.from_inputs(correlated_inputs(200, 40)), Unstructured(0.0))
        .weight
    )
    assert torch.equal(pruned, weight)


def test_the_argument_stays_as_it_was():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        weight = torch.nn.Parameter(weight_of(16, 16).to(dtype))
        before = weight.detach().clone()
        pruned = SparseGPT().solve(weight, Statistics.from_inputs(correlated_inputs(50, 16)), NM(2, 4)).weight
        assert torch.equal(weight, before)
        assert not pruned.requires_grad


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(1, 4)], ids=str)
def test_achieved_sparsity_and_positive_zeros(pattern):
    weight = weight_of(13, 300)
    pruned = SparseGPT().solve(weight, Statistics.from_inputs(correlated_inputs(400, 300)), pattern).weight
    zeros = int((pruned == 0).sum())
    assert abs(zeros - pattern.sparsity * weight.numel()) <= 3  # one weight for each of three blocks
    assert not pruned[pruned == 0].signbit().any()


def test_what_is_not_finite_is_refused():
    inputs, weight = correlated_inputs(50, 16), weight_of(8, 16)
    weight[3, 4] = float("inf")
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        SparseGPT().solve(weight, Statistics.from_inputs(inputs), Unstructured(0.5))
    inputs[3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        SparseGPT().solve(weight_of(8, 16), Statistics.from_inputs(inputs), Unstructured(0.5))


def test_settings_and_widths_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="block"):
        SparseGPT(block=0)
    with pytest.raises(ValueError, match="damping"):
        SparseGPT(damping=0.0)
    with pytest.raises(ValueError, match="not a multiple of 4"):
        SparseGPT().solve(weight_of(4, 10), Statistics.from_inputs(correlated_inputs(50, 10)), NM(2, 4))
