"""Rounding against GPTQ with an explicit inverse, one weight at a time, and against what a level could be
instead."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import correlated_inputs, weight_of
from torch import Tensor

from secateurs.pattern import Mask
from secateurs.pruning.solvers import grid, grid_cpu
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.pruning.solvers.sweep_cpu import ISAS
from secateurs.values import Values

GRIDS = [Values(4, 32), Values(3, 32), Values(2, 32, "half"), Values(4, 64, "half"), Values(8, 128)]


def masked(outputs: int, width: int, share: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (out, in), float64, and the places of it that are kept; it is 0 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(outputs, width, generator=generator) >= share
    return weight_of(outputs, width, seed=seed + 1) * kept, kept


def levels(values: Values) -> np.ndarray:
    return values.lowest + values.step * np.arange(2**values.bits)


def naive(
    inputs: np.ndarray,
    weight: np.ndarray,
    kept: np.ndarray,
    scales: np.ndarray,
    values: Values,
    shrinkage: float,
) -> np.ndarray:
    """GPTQ under a mask: eliminates inputs one by one from H^-1 (arXiv 2210.17323, equation 2)."""
    weight = weight.copy()
    outputs, width = weight.shape
    moment = inputs.T @ inputs / len(inputs)
    moment = (1 - shrinkage) * moment + shrinkage * np.diag(np.diag(moment))
    moment += 0.01 * np.diag(moment).mean() * np.eye(width)
    inverse = np.linalg.inv(moment)
    for j in range(width):
        for row in range(outputs):
            grid = levels(values) * scales[row, j // values.group]
            rounded = grid[np.abs(grid - weight[row, j]).argmin()] if kept[row, j] else 0.0
            weight[row, j:] -= (weight[row, j] - rounded) / inverse[j, j] * inverse[j, j:]
            weight[row, j] = rounded
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return weight


def objective(moment: Tensor, dense: Tensor, rounded: Tensor) -> float:
    """What coordinate descent lowers."""
    moment = (1 - Rounding.shrinkage) * moment + Rounding.shrinkage * moment.diagonal().diag()
    moment = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return float((((dense - rounded) @ moment) * (dense - rounded)).sum())


@pytest.mark.parametrize("values", GRIDS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("width", [96, 75])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_the_sweep_is_gptq(values: Values, share: float, width: int, shrinkage: float) -> None:
    inputs = correlated_inputs(300, width)
    weight, kept = masked(7, width, share)
    solver = Rounding(values, passes=0, shrinkage=shrinkage)
    solution = solver.solve(weight, Statistics.from_inputs(inputs), Mask(kept))
    assert solution.scales is not None
    assert solution.scales.shape == (7, values.groups(width))
    scales = solution.scales.double().numpy()
    expected = naive(inputs.numpy(), weight.numpy(), kept.numpy(), scales, values, shrinkage)
    np.testing.assert_allclose(solution.weight.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("values", GRIDS[:4], ids=str)
def test_scales_are_about_the_best_there_are(values: Values) -> None:
    """Each group's by itself, against many more of them."""
    weight, kept = masked(20, 32, 0.4)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1

    def error(scales: Tensor) -> Tensor:
        lies = torch.from_numpy(levels(values)) * scales[:, None]  # (out, levels)
        gaps = (weight[:, :, None] - lies[:, None]).abs().amin(-1)
        return (gaps.square() * importance * kept).sum(1)

    found = grid.choose_scales(weight.T.contiguous(), kept.T.contiguous(), importance, values)
    assert torch.equal(found.bfloat16().double(), found)
    largest = weight.abs().amax(1) / max(abs(values.lowest), values.highest)
    best = torch.stack([error(largest * share) for share in torch.linspace(-1.2, 1.2, 2000)]).amin(0)
    assert error(found).sum() <= 1.1 * best.sum()


@pytest.mark.parametrize("values", GRIDS, ids=str)
@settings(max_examples=20, deadline=None)
@given(share=st.sampled_from([0.0, 0.3, 0.7]), width=st.integers(3, 80), seed=st.integers(0, 2**10))
def test_passes_never_raise_the_error(values: Values, share: float, width: int, seed: int) -> None:
    statistics = Statistics.from_inputs(correlated_inputs(2 * width, width, seed=seed))
    weight, kept = masked(5, width, share, seed=seed)
    errors = [
        objective(
            statistics.moment, weight, Rounding(values, passes).solve(weight, statistics, Mask(kept)).weight
        )
        for passes in range(4)
    ]
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("values", GRIDS[:3], ids=str)
def test_in_the_end_no_other_level_is_better(values: Values) -> None:
    statistics = Statistics.from_inputs(correlated_inputs(150, 40))
    weight, kept = masked(3, 40, 0.5)
    solution = Rounding(values, passes=60).solve(weight, statistics, Mask(kept))
    assert solution.scales is not None
    least = objective(statistics.moment, weight, solution.weight)
    for row, column in kept.nonzero().tolist():
        for level in levels(values):
            other = solution.weight.clone()
            other[row, column] = float(level) * float(solution.scales[row, column // values.group])
            assert objective(statistics.moment, weight, other) >= least * (1 - 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", GRIDS, ids=str)
@settings(max_examples=10, deadline=None)
@given(share=st.sampled_from([0.0, 0.5]), width=st.integers(1, 140), seed=st.integers(0, 2**10))
def test_every_weight_lies_on_the_grid(
    values: Values, dtype: torch.dtype, share: float, width: int, seed: int
) -> None:
    """Also as it is stored, and the zeros are the mask's."""
    weight, kept = masked(6, width, share, seed=seed)
    statistics = Statistics.from_inputs(correlated_inputs(2 * width, width, seed=seed).float())
    solution = Rounding(values).solve((weight / 20).to(dtype), statistics, Mask(kept))
    assert solution.scales is not None
    assert solution.scales.dtype == torch.bfloat16
    stored = solution.weight.to(dtype)
    again = values.decode(values.encode(stored, solution.scales), solution.scales).to(dtype)
    assert torch.equal(stored, again * kept)
    assert not stored[~kept].any()
    assert not stored[stored == 0].signbit().any()
    if values.grid == "half":
        assert stored[kept].all()


@pytest.mark.parametrize("values", [Values(4, 32), Values(2, 32, "half")], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_better_than_the_nearest_levels(values: Values, share: float) -> None:
    """Of grids that reach as far as each group's largest weight, and of the scales that were found."""
    statistics = Statistics.from_inputs(correlated_inputs(400, 128).float())
    weight, kept = (tensor.float() for tensor in masked(24, 128, share))
    kept = kept.bool()
    solution = Rounding(values, shrinkage=0.0).solve(weight, statistics, Mask(kept))
    assert solution.scales is not None
    largest = weight.abs().unflatten(1, (-1, 32)).amax(2) / max(abs(values.lowest), values.highest)
    for scales in (largest.bfloat16(), solution.scales):
        nearest = values.decode(values.encode(weight, scales), scales) * kept
        assert statistics.error(weight, solution.weight) < 0.6 * statistics.error(weight, nearest)


@pytest.mark.parametrize("values", GRIDS, ids=str)
def test_inputs_that_are_independent_leave_the_nearest_levels(values: Values) -> None:
    weight, kept = masked(6, 90, 0.3)
    statistics = Statistics.from_inputs(torch.eye(90, dtype=torch.float64))
    solution = Rounding(values, passes=0).solve(weight, statistics, Mask(kept))
    assert solution.scales is not None
    nearest = values.decode(values.encode(weight, solution.scales), solution.scales) * kept
    torch.testing.assert_close(solution.weight, nearest.double(), rtol=0, atol=0)


def test_dead_inputs_and_empty_groups() -> None:
    """Dead inputs are rounded as they are, and count for nothing; where a group has no weights it is 0."""
    inputs = correlated_inputs(200, 96)
    inputs[:, 3] = 0
    inputs[:, 64:] = 0
    weight, kept = masked(5, 96, 0.0)
    weight[:, 3] *= 100
    weight[0, :32] = 0
    kept[0, :32] = False
    values = Values(4, 32)
    solution = Rounding(values).solve(weight, Statistics.from_inputs(inputs), Mask(kept))
    assert solution.scales is not None
    assert not solution.weight[0, :32].any()
    assert solution.scales[0, 0] == 0
    assert (solution.weight - weight)[1:, 4:32].abs().max() < 1
    assert (solution.weight - weight)[:, 64:].abs().max() < weight[:, 64:].abs().max() / 7


def test_what_is_not_finite_is_refused() -> None:
    weight, kept = masked(8, 16, 0.0)
    weight[3, 4] = float("inf")
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        Rounding(Values(4)).solve(weight, Statistics.from_inputs(correlated_inputs(50, 16)), Mask(kept))


# The C++ loops against those in torch, in float64.

compiled = pytest.mark.skipif(not grid_cpu.serves(torch.empty(0)), reason="installed without a compiler")


@compiled
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.integers(1, 128), st.sampled_from(GRIDS), st.booleans(), st.sampled_from(ISAS))
def test_columns_settle_as_in_torch(
    outputs: int, columns: int, values: Values, known: bool, isa: str
) -> None:
    weight, kept = (tensor.T.contiguous() for tensor in masked(outputs, columns, 0.3))
    generator = torch.Generator().manual_seed(columns)
    push = 0.3 * torch.randn(columns, columns, generator=generator).double() / columns
    before = weight + 0.1 if known else None
    scale = (0.0973 * weight.abs().amax(0)).float().double()
    expected, actual = weight.clone(), weight.float()
    grid.settle(expected, before, kept, scale, push, values)
    grid_cpu.settle(
        actual,
        None if before is None else before.float(),
        kept,
        scale.float(),
        push.float(),
        values,
        isa=isa,
    )
    # A weight that lies halfway may go either way, and others after it.
    same = ((actual.double() - expected).abs() <= 1e-4).double().mean(0)
    assert (same == 1).double().mean() > 0.9 or outputs < 10


@compiled
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.integers(1, 128), st.sampled_from(GRIDS), st.sampled_from(ISAS))
def test_scales_are_chosen_as_in_torch(outputs: int, columns: int, values: Values, isa: str) -> None:
    weight, kept = (tensor.T.contiguous() for tensor in masked(outputs, columns, 0.5))
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(1)).double() + 0.1

    def error(scale: Tensor) -> Tensor:
        rounded = grid.levels_of(weight, scale, values) * scale
        return ((rounded - weight).square() * kept * importance[:, None]).sum(0)

    expected = grid.choose_scales(weight, kept, importance, values)
    actual = grid_cpu.choose_scales(weight.float(), kept, importance.float(), values, isa=isa).double()
    assert torch.equal(actual.bfloat16().double(), actual)
    torch.testing.assert_close(error(actual), error(expected), rtol=1e-3, atol=1e-6)


@compiled
def test_same_bits_for_any_number_of_threads() -> None:
    weight, kept = masked(150, 100, 0.4)
    statistics = Statistics.from_inputs(torch.eye(100))
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(Rounding(Values(4, 32)).solve(weight.float(), statistics, Mask(kept)).weight)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
