"""ADMM against a plain transcription of the algorithm, exact solutions, and SparseGPT."""

import numpy as np
import pytest
import torch
from problems import correlated_inputs, weight_of

from secateurs.pattern import NM, Pattern, Unstructured
from secateurs.pruning.solvers.admm import ADMM, RHO
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.statistics import Statistics

PATTERNS = [Unstructured(0.7), NM(2, 4), NM(1, 3)]


def naive_mask(point: np.ndarray, pattern: Pattern, sparsity: float) -> np.ndarray:
    size = np.abs(point)
    if isinstance(pattern, NM):
        for row in size.reshape(-1, pattern.m):
            row[np.argsort(row)[pattern.m - pattern.n :]] = np.inf
    keep = np.ones(size.size, dtype=bool)
    keep[np.argsort(size.ravel())[: round(sparsity * size.size)]] = False
    return keep.reshape(size.shape)


def naive(
    inputs: np.ndarray, weight: np.ndarray, pattern: Pattern, *, iterations: int, polish: int, ridge: float
) -> np.ndarray:
    """Z, U and W as arXiv 2401.02938 writes them (algorithm 2), then textbook CG on each row."""
    moment = inputs.T @ inputs / len(inputs)
    norms = np.sqrt(np.diag(moment))
    correlations = moment / np.outer(norms, norms) + ridge * np.eye(len(norms))
    dense = weight * norms
    w, u, previous = dense, np.zeros_like(dense), RHO[0]
    for i in range(iterations):
        rho = RHO[3 * i // iterations]
        u = u * previous / rho
        previous = rho
        keep = naive_mask(w + u, pattern, pattern.sparsity * (1 - (1 - (i + 1) / iterations) ** 3))
        z = (w + u) * keep
        u = u + (w - z)
        w = (dense @ correlations + rho * (z - u)) @ np.linalg.inv(correlations + rho * np.eye(len(norms)))
    result = w * keep
    for row in range(len(weight)):
        kept = keep[row]
        matrix, wanted = correlations[np.ix_(kept, kept)], (dense[row] @ correlations)[kept]
        x = result[row, kept]
        residual = wanted - matrix @ x
        direction = residual
        for _ in range(polish):
            step = residual @ residual / (direction @ matrix @ direction)
            x = x + step * direction
            smaller = residual - step * (matrix @ direction)
            direction = smaller + (smaller @ smaller) / (residual @ residual) * direction
            residual = smaller
        result[row, kept] = x
    return result / norms


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("outputs", "tokens"), [(14, 200), (14, 20), (1, 200)])
def test_same_as_the_algorithm_on_paper(pattern, outputs, tokens):
    inputs, weight = correlated_inputs(tokens, 36), weight_of(outputs, 36)
    expected = naive(inputs.numpy(), weight.numpy(), pattern, iterations=10, polish=4, ridge=0.02)
    solver = ADMM(iterations=10, polish=4, ridge=0.02)
    pruned = solver.solve(weight, Statistics.from_inputs(inputs), pattern).weight.numpy()
    np.testing.assert_array_equal(pruned != 0, expected != 0)
    np.testing.assert_allclose(pruned, expected, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_last_solve_finds_the_best_weights_of_its_mask(pattern):
    inputs, weight = correlated_inputs(200, 36), weight_of(14, 36)
    pruned = ADMM(polish=40).solve(weight, Statistics.from_inputs(inputs), pattern).weight.numpy()
    norms = np.sqrt((inputs.numpy() ** 2).mean(axis=0))
    moment = inputs.numpy().T @ inputs.numpy() / 200 + 0.01 * np.diag(norms**2)
    for row, dense in zip(pruned, weight.numpy(), strict=True):
        kept = row != 0
        best = np.linalg.solve(moment[np.ix_(kept, kept)], (moment @ dense)[kept])
        np.testing.assert_allclose(row[kept], best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", [*PATTERNS, Unstructured(0.5), Unstructured(0.9)], ids=str)
@pytest.mark.parametrize("tokens", [1000, 60], ids=["many tokens", "fewer tokens than inputs"])
def test_never_further_from_the_dense_layer_than_sparsegpt(pattern, tokens):
    inputs, weight = correlated_inputs(tokens, 144).float(), weight_of(96, 144).float()
    statistics = Statistics.from_inputs(inputs)
    admm = statistics.error(weight, ADMM().solve(weight, statistics, pattern).weight)
    assert admm < statistics.error(weight, SparseGPT().solve(weight, statistics, pattern).weight)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_objective_is_the_reconstruction_error(dtype, tolerance):
    inputs, weight = correlated_inputs(300, 60).to(dtype), weight_of(20, 60).to(dtype)
    statistics = Statistics.from_inputs(inputs)
    solution = ADMM().solve(weight, statistics, Unstructured(0.7))
    assert len(solution.objective) == 1 + ADMM().polish
    assert solution.objective[-1] == pytest.approx(statistics.error(weight, solution.weight), rel=tolerance)
    assert solution.objective[-1] < solution.objective[0]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_single_precision_loses_nothing_that_matters(pattern, seed):
    """The reconstruction error is within 5 % of that in double precision.

    Near-equal scores in 30 successive masks fall differently, which moves the error either way.
    """
    inputs, weight = correlated_inputs(600, 144, seed=seed), weight_of(48, 144, seed=seed)
    exact = Statistics.from_inputs(inputs)
    double = ADMM().solve(weight, exact, pattern).weight
    single = ADMM().solve(weight.float(), Statistics.from_inputs(inputs.float()), pattern).weight
    assert single.dtype == torch.float32
    assert exact.error(weight, single) == pytest.approx(exact.error(weight, double), rel=0.05)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_independent_inputs_leave_nothing_to_correct(pattern):
    """Weights that stay do not change, and the mask is within 2 % of the best one."""
    scales = torch.linspace(0.5, 4.0, 36, dtype=torch.float64)
    weight = weight_of(10, 36)
    statistics = Statistics.from_inputs((scales * 6).diag())
    pruned = ADMM().solve(weight, statistics, pattern).weight
    torch.testing.assert_close(pruned, weight * (pruned != 0), rtol=0, atol=1e-12)
    best = weight * pattern.keep(weight.abs() * scales)
    assert statistics.error(weight, pruned) < 1.02 * statistics.error(weight, best)


def test_dead_inputs_change_nothing_else():
    inputs, weight = correlated_inputs(200, 36), weight_of(14, 36)
    alive = torch.ones(36, dtype=torch.bool)
    alive[[3, 17, 18]] = False
    dead = inputs * alive
    # 252 of 504 weights fall, the 42 dead ones first; without those inputs, 210 of 462.
    pruned = ADMM().solve(weight, Statistics.from_inputs(dead), Unstructured(0.5)).weight
    smaller = Statistics.from_inputs(inputs[:, alive])
    assert (pruned[:, ~alive] == 0).all()
    assert (pruned == 0).sum() == 252
    assert smaller.error(weight[:, alive], pruned[:, alive]) < 0.2


def test_a_layer_without_input_is_zero():
    solution = ADMM().solve(weight_of(4, 8), Statistics.from_inputs(torch.zeros(10, 8)), NM(2, 4))
    assert not solution.weight.any()
    assert set(solution.objective) == {0.0}


def test_no_sparsity_no_change():
    weight = weight_of(12, 36)
    pruned = (
        ADMM().solve(weight, Statistics.from_inputs(correlated_inputs(200, 36)), Unstructured(0.0)).weight
    )
    torch.testing.assert_close(pruned, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_achieved_sparsity_and_positive_zeros(pattern):
    weight = weight_of(13, 60).bfloat16()
    before = weight.clone()
    pruned = ADMM().solve(weight, Statistics.from_inputs(correlated_inputs(400, 60).float()), pattern).weight
    assert torch.equal(weight, before)
    assert (pruned == 0).sum() == round(pattern.sparsity * 13 * 60)
    assert not pruned[pruned == 0].signbit().any()


def test_what_is_not_finite_is_refused():
    inputs, weight = correlated_inputs(50, 16), weight_of(8, 16)
    weight[3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        ADMM().solve(weight, Statistics.from_inputs(inputs), Unstructured(0.5))
    inputs[3, 4] = float("inf")
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        ADMM().solve(weight_of(8, 16), Statistics.from_inputs(inputs), Unstructured(0.5))


@pytest.mark.parametrize("settings", [{"iterations": 2}, {"polish": -1}, {"ridge": 0.0}], ids=str)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ADMM(**settings)


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="not a multiple of 4"):
        ADMM().solve(weight_of(4, 10), Statistics.from_inputs(correlated_inputs(50, 10)), NM(2, 4))
