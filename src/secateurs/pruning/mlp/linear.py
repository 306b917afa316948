"""A linear layer with the pattern that is asked of it, and how it is fitted to a goal and pruned."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateurs import ranks
from secateurs.pattern import Mask, Pattern, Unstructured
from secateurs.pruning.solvers.solver import Solution, Solver, finished, rounded
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.statistics import Products, Statistics, share_lost


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Args:
        weight: (out, in), in the dtype that it is saved in: what is scored and propagated is rounded to it.
        bias: (out,), or None; in its own such dtype.
        pattern: which of its weights may stay; None leaves the layer as it is.
    """

    weight: Tensor
    bias: Tensor | None
    pattern: Pattern | None

    def of_rows(self, rows: Tensor | None) -> "Linear":
        """Some of its outputs, among themselves; None are all."""
        if rows is None:
            return self
        rows = rows.to(self.weight.device)
        pattern = self.pattern
        if isinstance(pattern, Mask):
            pattern = replace(pattern, kept=pattern.kept[rows])
        bias = None if self.bias is None else self.bias[rows]
        return Linear(self.weight[rows], bias, pattern)


class Pruned(NamedTuple):
    """A linear layer after pruning."""

    layer: Linear
    lost: float
    """What pruning lost of the fitted layer's output, and what there was (`Statistics.lost`)."""
    energy: float
    objective: tuple[float, ...]
    """Of the solver."""
    scales: Tensor | None = None
    """Of a solver that rounds, (out, groups)."""

    @property
    def error(self) -> float:
        """The share that was lost."""
        return share_lost(self.lost, self.energy)

    @classmethod
    def joined(cls, parts: Sequence["Pruned"], pattern: Pattern | None) -> "Pruned":
        """A layer from its parts (`ranks.rows_of_parts`), and the pattern of all of it."""
        if len(parts) == 1:
            return parts[0]
        layers = [part.layer for part in parts]
        lost, energy = sum(part.lost for part in parts), sum(part.energy for part in parts)
        shares = [part.energy / energy if energy > 0 else 1 / len(parts) for part in parts]
        return cls(
            Linear(
                _interleaved([layer.weight for layer in layers]),
                _interleaved([layer.bias for layer in layers if layer.bias is not None]),
                pattern,
            ),
            lost,
            energy,
            tuple(
                sum(share * error for share, error in zip(shares, errors, strict=True))
                for errors in zip(*(part.objective for part in parts), strict=True)
            ),
            _interleaved([part.scales for part in parts if part.scales is not None]),
        )


def _interleaved(parts: Sequence[Tensor]) -> Any:
    """A tensor whose rows were divided; None of none."""
    if not parts:
        return None
    whole = torch.cat([*parts])
    rows = torch.cat(ranks.rows_of_parts(len(whole), len(parts)))
    return torch.empty_like(whole).index_copy_(0, rows.to(whole.device), whole)


def prune_linear(
    solver: Solver,
    layer: Linear,
    moments: Statistics,
    goal: Products | None,
    damping: float,
) -> Pruned:
    """Prune a linear layer, fitted to its goal first if it has one.

    A bias makes up for the mean of what is lost, so that the weights need only follow the inputs' deviations
    from their mean.

    Args:
        solver: the local solver.
        layer: to start from.
        moments: of its inputs.
        goal: what its outputs ought to be; None keeps them as they are.
        damping: of the fit.
    """
    if layer.pattern is None:
        return Pruned(layer, 0.0, 0.0, ())
    dense = cast(layer, moments.mean.dtype)
    if dense.bias is None:
        inputs, mean = moments, None
        wanted = None if goal is None else goal.moment
    else:
        inputs = moments.centred()
        mean = torch.addmv(dense.bias, dense.weight, moments.mean) if goal is None else goal.mean
        wanted = None if goal is None else torch.addr(goal.moment, mean, moments.mean, alpha=-1)
    weight = dense.weight if wanted is None else inputs.fit(dense.weight, wanted, damping)
    solution = solve(solver, dense.weight, weight, inputs, layer.pattern)
    sparse = rounded(solution.weight, layer.weight.dtype)
    bias = None
    if layer.bias is not None and mean is not None:
        made_up = torch.addmv(mean, sparse.to(mean.dtype), moments.mean, alpha=-1)
        bias = rounded(made_up, layer.bias.dtype)
    lost = inputs.lost(weight, sparse.to(weight.dtype))
    return Pruned(Linear(sparse, bias, layer.pattern), *lost, solution.objective, solution.scales)


def pruning_of(
    solver: Solver, layer: Linear, moments: Statistics, goal: Products | None, damping: float
) -> ranks.Task:
    """`prune_linear`, for ranks to share."""

    def prune(rows: Tensor | None) -> Pruned:
        wanted = None if goal is None else goal.of_rows(rows)
        return prune_linear(solver, layer.of_rows(rows), moments, wanted, damping)

    cost = 0.0 if layer.pattern is None else solving_cost(*layer.weight.shape)
    return ranks.Task(cost, prune, len(layer.weight))


def solving_cost(rows: int, columns: int) -> float:
    """Of a solver, for a weight (out, in): products with H, and factorisations of that."""
    return float((rows + columns) * columns**2)


def solve(
    solver: Solver, before: Tensor, weight: Tensor, statistics: Statistics, pattern: Pattern
) -> Solution:
    """What a solver makes of a weight that was fitted to a goal.

    Where the pattern has no zeros the fit stays as it is, but that zeros from before it stay zeros.

    Args:
        solver: the solver.
        before: the weight before the fit, or itself.
        weight: (out, in).
        statistics: of its inputs.
        pattern: that is asked for.
    """
    if pattern != Unstructured(0.0):
        return solver.solve(weight, statistics, pattern)
    mask = Mask.of(before)
    if weight is before or mask.kept.all():
        return Solution(finished(weight.clone()))
    return SparseGPT().solve(weight, statistics, mask)


def cast(layer: Linear, dtype: torch.dtype) -> Linear:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return replace(layer, weight=layer.weight.to(dtype), bias=bias)


def apply(layer: Linear, inputs: Tensor) -> Tensor:
    return nn.functional.linear(inputs, layer.weight, layer.bias)
