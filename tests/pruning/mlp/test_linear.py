"""A layer pruned by parts, as ranks share it, against the same pruned at once."""

from typing import Any

import pytest
import torch

from secateurs.pattern import NM, Mask, Pattern, Unstructured
from secateurs.pruning.mlp.linear import Linear, Pruned, pruning_of
from secateurs.pruning.solvers.admm import ADMM
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.solver import Solver
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.statistics import Products, Statistics
from secateurs.pruning.solvers.wanda import Wanda
from secateurs.ranks import LEAST_ROWS, rows_of_parts
from secateurs.values import Values

ROWS, COLUMNS, TOKENS = 13, 64, 300


def layer(pattern: Pattern, *, bias: bool) -> Linear:
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    return Linear(weight, torch.randn(ROWS, dtype=torch.float64) if bias else None, pattern)


def sums(*, fitted: bool) -> tuple[Statistics, Products | None]:
    inputs = torch.randn(TOKENS, COLUMNS, dtype=torch.float64) @ torch.randn(COLUMNS, COLUMNS).double() + 1
    if not fitted:
        return Statistics.from_inputs(inputs), None
    goal = Products(ROWS, COLUMNS, dtype=torch.float64)
    goal.update(torch.randn(TOKENS, ROWS, dtype=torch.float64), inputs)
    return Statistics.from_inputs(inputs), goal


def by_parts(solver: Solver, whole: Linear, sums: tuple[Statistics, Products | None], count: int) -> Pruned:
    task = pruning_of(solver, whole, *sums, 0.01)
    parts = [task.do(rows) for rows in rows_of_parts(len(whole.weight), count)]
    return Pruned.joined(parts, whole.pattern)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("bias", "fitted"), [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("solver", [SparseGPT(), Wanda(), Rounding(Values(bits=4, group=32))])
def test_rows_that_do_not_compete_are_pruned_alike(
    solver: Solver, bias: bool, fitted: bool, count: int
) -> None:
    """Of n:m, and of a mask."""
    pattern: Pattern = NM(2, 4)
    if isinstance(solver, Rounding):
        pattern = Mask(torch.rand(ROWS, COLUMNS) > 0.5)
    whole, known = layer(pattern, bias=bias), sums(fitted=fitted)
    once = pruning_of(solver, whole, *known, 0.01).do(None)
    parts = by_parts(solver, whole, known, count)
    assert parts.layer.pattern is pattern
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(parts.layer.weight, once.layer.weight, **close)
    assert torch.equal(parts.layer.weight == 0, once.layer.weight == 0)
    assert (parts.layer.bias is None) == (once.layer.bias is None) == (not bias)
    if bias:
        torch.testing.assert_close(parts.layer.bias, once.layer.bias, **close)
    assert parts.error == pytest.approx(once.error)
    assert parts.objective == pytest.approx(once.objective)
    assert (parts.scales is None) == (once.scales is None) == (not isinstance(solver, Rounding))
    if parts.scales is not None and once.scales is not None:
        assert torch.equal(parts.scales, once.scales)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_where_rows_compete_each_part_has_its_share_and_little_is_lost(parts: int) -> None:
    """Rows are as large as their place in a head has it, as those of q and k may be."""
    rows = parts * LEAST_ROWS
    weight = torch.randn(rows, COLUMNS, dtype=torch.float64)
    weight *= torch.logspace(0, -1, 32)[torch.arange(rows) % 32, None]
    whole, known = Linear(weight, None, Unstructured(0.75)), sums(fitted=False)
    once = pruning_of(ADMM(), whole, *known, 0.01).do(None)
    divided = by_parts(ADMM(), whole, known, parts)
    zeros = divided.layer.weight == 0
    for part in rows_of_parts(rows, parts):
        assert int(zeros[part].sum()) == round(0.75 * len(part) * COLUMNS)
    assert divided.error == pytest.approx(once.error, rel=0.02)
    assert divided.objective[-1] == pytest.approx(divided.error, rel=1e-6)
