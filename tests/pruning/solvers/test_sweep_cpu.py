"""The C++ sweep against the torch one in float64."""

from shutil import which

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import correlated_inputs, weight_of

from secateurs.pattern import NM, Pattern, Unstructured
from secateurs.pruning.solvers import sparsegpt, sweep, sweep_cpu
from secateurs.pruning.solvers.statistics import Statistics

pytestmark = pytest.mark.skipif(
    not sweep_cpu.serves(torch.empty(0)) and not which("c++"), reason="there is no compiler to install with"
)

PATTERNS = [Unstructured(0.7), Unstructured(0.0), NM(2, 4), NM(4, 8), NM(1, 3), NM(3, 5), NM(7, 20)]


def block_of(outputs: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and inverse as the sweep gets them for one block, in float64."""
    inverse = Statistics.from_inputs(correlated_inputs(2 * columns, columns)).factor(0.01).inverse()
    return weight_of(outputs, columns).T.contiguous(), inverse


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 100), st.integers(1, 12), st.sampled_from(PATTERNS), st.sampled_from(sweep_cpu.ISAS))
def test_same_as_torch(outputs: int, groups: int, pattern: Pattern, isa: str) -> None:
    expected, inverse = block_of(outputs, groups * getattr(pattern, "m", 11))
    actual = expected.float()
    sweep.sweep(expected, inverse, pattern)
    sweep_cpu.sweep(actual, inverse.float(), pattern, isa=isa)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual == 0, expected == 0)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(3, 8)], ids=str)
def test_equal_scores_are_settled_alike(pattern: Pattern) -> None:
    expected = torch.ones(8, 40)
    actual = expected.clone()
    sweep.sweep(expected, torch.eye(8), pattern)
    sweep_cpu.sweep(actual, torch.eye(8), pattern)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
def test_same_bits_for_any_number_of_threads(pattern: Pattern) -> None:
    weight, inverse = (tensor.float() for tensor in block_of(150, 120))
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(weight.clone())
            sweep_cpu.sweep(results[-1], inverse, pattern)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        sweep_cpu.sweep(torch.ones(10, 4), torch.eye(10), NM(2, 4))
    with pytest.raises(AssertionError):
        sweep_cpu.sweep(torch.ones(8, 4), torch.eye(8, dtype=torch.float64), NM(2, 4))


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
def test_a_whole_layer(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that is used, and as good as torch's."""
    weight = weight_of(20, 72).float()
    statistics = Statistics.from_inputs(correlated_inputs(200, 72).float())
    calls = []

    def counted(*arguments: object) -> None:
        calls.append(1)
        real(*arguments)

    real = sweep_cpu.sweep
    monkeypatch.setattr(sweep_cpu, "sweep", counted)
    actual = sparsegpt.SparseGPT(block=32).solve(weight, statistics, pattern).weight
    assert len(calls) == 3
    monkeypatch.setattr(sparsegpt, "sweep_for", lambda weight: sweep.sweep)
    expected = sparsegpt.SparseGPT(block=32).solve(weight, statistics, pattern).weight
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
def test_what_is_not_finite_is_refused(pattern: Pattern) -> None:
    weight = weight_of(8, 16).float()
    weight[3, 4] = float("nan")
    statistics = Statistics.from_inputs(correlated_inputs(50, 16).float())
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        sparsegpt.SparseGPT().solve(weight, statistics, pattern)
