"""SparseLLM (Bai et al., arXiv 2402.17946): a block's MLP pruned as one problem.

Over calibration tokens X (the MLP's input) and Y (what its output ought to be), with auxiliary variables s
and z for the pre-activations of gate and up and p for the input of down, the method lowers

    alpha |s - Wg X|^2 + alpha |z - Wu X|^2 + gamma |p - f(s) z|^2 + |Y - Wd p|^2    (the paper's equation 5)

over the sparse weights and over p, z and s in turn; biases are left out here for brevity, and an MLP without
a gate has p - f(z). What differs from the published code:

- Each term is relative to its energy in the dense model: alpha and gamma mean the same for every model.
- Weights are fitted by a ridge step from where they are, which never raises their term; there is no
  pseudo-inverse of activations, only second moments that are summed as tokens stream by.
- p is found in a system of the hidden size; s (and z without a gate) takes a safeguarded Newton step.
- Down is fitted to what the pruned gate and up really give, and the iterate is kept that is best on tokens
  that none of its weights were fitted to.
- An iteration reads the tokens once: p, z and s step while the products to fit down by are summed, and so
  with down as it was before.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from secateurs import ranks
from secateurs.pruning.mlp.linear import Pruned, apply, cast, pruning_of
from secateurs.pruning.mlp.problem import (
    CHUNK,
    MLP,
    MLPSolution,
    Tokens,
    rows_of,
    running_dtype,
    slices,
    squares,
)
from secateurs.pruning.mlp.steps import correct_p, hidden_inverse, step_s, step_z
from secateurs.pruning.record import Iterate
from secateurs.pruning.solvers.admm import ADMM
from secateurs.pruning.solvers.solver import Solver, working_dtype
from secateurs.pruning.solvers.statistics import Products, Statistics

ITERATIONS = 4
"""By default."""


class Weights(NamedTuple):
    """What the squared residuals of the four terms count for, per token."""

    gate: float
    up: float
    hidden: float
    output: float


@dataclass(frozen=True)
class SparseLLM:
    """Pruning of a block's MLP as one problem, around any local solver.

    Args:
        solver: prunes each layer once it is fitted, and the layers outside MLPs.
        iterations: after the first pruning; with 0, down is fitted to the pruned gate and up, and no more. By
            default 4, in a run of `prune` what its effort says.
        alpha: weight of the pre-activations' terms, relative to the output's.
        gamma: weight of the hidden term, relative to the output's.
        damping: of the fits, that of o among them, as a share of the mean of H's diagonal.

    Raises:
        ValueError: a solver that is not local, iterations that are no whole number or below 0, a ratio or
            damping that is not positive.
    """

    solver: Solver = field(default_factory=ADMM)
    iterations: int | None = None
    alpha: float = 0.3
    gamma: float = 0.3
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not hasattr(self.solver, "solve"):
            raise ValueError("the solver inside SparseLLM is a local one: admm, or in Python ADMM()")
        if self.iterations is not None and (not isinstance(self.iterations, int) or self.iterations < 0):
            raise ValueError(f"iterations is a whole number, not {self.iterations!r}")
        for name in ("alpha", "gamma", "damping"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")

    @property
    def rounds(self) -> int:
        """The iterations, also where none were given."""
        return ITERATIONS if self.iterations is None else self.iterations

    @torch.no_grad()
    def prune(self, mlp: MLP, tokens: Tokens) -> MLPSolution:
        """Prune an MLP.

        Memory: beside the tokens, s and z in the dtype of the inputs; of the sums over tokens one matrix
        (channels, channels) with the solver's factors of it, one (channels, hidden) for each layer, and one
        (hidden, hidden); of down, two more of its size.

        Args:
            mlp: its dense layers; not modified.
            tokens: what it reads, and what its output ought to be; on any device.

        Raises:
            FloatingPointError: the weights or tokens hold NaN or Inf, or the solver gives some. (In a later
                iteration that only ends them.)
        """
        return _Run(self, mlp, tokens).solution()


class _Run:
    """The iterations on one MLP."""

    def __init__(self, settings: SparseLLM, mlp: MLP, tokens: Tokens) -> None:
        self.settings, self.dense, self.tokens = settings, mlp, tokens
        self.iterations = settings.rounds
        self.dtype, self.device = working_dtype(mlp.down.weight), mlp.down.weight.device
        self.running = running_dtype(mlp, tokens.inputs[0], self.dtype, self.device)
        self.solving, self.held_out = rows_of(tokens.inputs, hold_out=self.iterations > 0)
        self.moments = Statistics(mlp.first[0].weight.shape[1], dtype=self.dtype, device=self.device)
        self.auxiliary: list[Tensor] = []  # s beside z, for every batch
        self.weights = self._measure()

    def _chunks(self, rows: Sequence[Tensor], *more: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """X and Y of a few of the rows at a time, to compute with, and views of what has a row for each."""
        for x, y, chosen, *others in zip(*self.tokens, rows, *more, strict=True):
            for part, *views in zip(*(tensor.split(CHUNK) for tensor in (chosen, *others)), strict=True):
                yield self._read(x[part]), self._read(y[part]), *views

    def _read(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.running)

    def _measure(self) -> Weights:
        """Take in X, start s and z where the dense MLP has them, weigh the terms by their energy there."""
        energy = torch.zeros(4, dtype=torch.float64, device=self.device)
        outputs = sum(len(layer.weight) for layer in self.dense.first)
        if self.iterations:
            self.auxiliary = [
                x.new_empty(len(rows), outputs)
                for x, rows in zip(self.tokens.inputs, self.solving, strict=True)
            ]
        first = cast(self.dense.stacked(), self.running)
        for x, y, *auxiliary in self._chunks(self.solving, *([self.auxiliary] if self.auxiliary else [])):
            self.moments.update(x)
            before = apply(first, x)
            halves = before.chunk(2, dim=1) if self.dense.gated else (before, before)
            parts = (*halves, self.dense.channels(before), y)
            energy += torch.stack([squares(part, self.dtype) for part in parts])
            if auxiliary:
                auxiliary[0].copy_(before)
        ranks.pool(self.moments)
        ranks.summed(energy)
        tiny = torch.finfo(torch.float32).tiny
        per_token = (energy / self.moments.tokens).clamp_min(tiny).tolist()
        alpha, gamma = self.settings.alpha, self.settings.gamma
        return Weights(*(w / e for w, e in zip((alpha, alpha, gamma, 1.0), per_token, strict=True)))

    def solution(self) -> MLPSolution:
        iterations = self.iterations
        iterates: list[Iterate] = []
        best: tuple[float, MLPSolution] | None = None
        mlp = self.dense
        step: _Step | None = None
        objective: float | None = None
        terms: dict[str, float] = {}
        for k in range(iterations + 1):
            try:
                if step:
                    objective, terms = step.result()
                first = self._prune_first(mlp, step.goals if step else [None] * len(mlp.first))
                step = None  # before the next one takes as much memory
                mlp = replace(mlp, first=tuple(pruned.layer for pruned in first))
                if k < iterations:
                    step = _Step(mlp, self.settings, self.weights, self.dtype, self.running)
                down = self._prune_down(mlp, step)
                mlp = replace(mlp, down=down.layer)
                solution = MLPSolution(first, down, iterates, k)
                if not iterations:
                    return solution
                lost = self._held_out_error(mlp)
            except FloatingPointError:
                if best is None:
                    raise
                break
            iterates.append(Iterate(objective, terms, lost))
            if best is None or lost < best[0]:
                best = lost, solution
        assert best is not None
        return best[1]

    def _prune_first(self, mlp: MLP, goals: Sequence[Products | None]) -> tuple[Pruned, ...]:
        settings = self.settings
        tasks = deque(
            pruning_of(settings.solver, layer, self.moments, goal, settings.damping)
            for layer, goal in zip(mlp.first, goals, strict=True)
        )
        found = ranks.shared_out(tasks, self.device)
        return tuple(
            Pruned.joined(parts, layer.pattern) for parts, layer in zip(found, mlp.first, strict=True)
        )

    def _prune_down(self, mlp: MLP, step: "_Step | None") -> Pruned:
        """Prune down, fitted to what the pruned gate and up give, from where the dense one is. The step, if
        there is one, is taken on the way."""
        settings, down = self.settings, self.dense.down
        moments = Statistics(down.weight.shape[1], dtype=self.dtype, device=self.device)
        products = Products(*down.weight.shape, dtype=self.dtype, device=self.device)
        first = cast(mlp.stacked(), self.running)
        for x, y, *auxiliary in self._chunks(self.solving, *([self.auxiliary] if step else [])):
            before = apply(first, x)
            if step:
                step.take(x, y, before, auxiliary[0])
            channels = mlp.channels(before)
            moments.update(channels)
            products.update(y, channels)
        ranks.pool(moments, products)
        if step:
            step.pool()
        task = pruning_of(settings.solver, down, moments, products, settings.damping)
        [parts] = ranks.shared_out(deque([task]), self.device)
        return Pruned.joined(parts, down.pattern)

    def _held_out_error(self, mlp: MLP) -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        first, down = cast(mlp.stacked(), self.running), cast(mlp.down, self.running)
        for x, y in self._chunks(self.held_out):
            output = apply(down, mlp.channels(apply(first, x)))
            sums += torch.stack([squares(output.sub_(y), self.dtype), squares(y, self.dtype)])
        lost, energy = ranks.summed(sums).tolist()
        error = lost / energy if energy > 0 else 0.0
        if not math.isfinite(error):
            raise FloatingPointError("the output of the pruned MLP is not finite on the calibration text")
        return error


class _Step:
    """One step of p, z and s on every token, and the products that gate and up are to be fitted by then.

    Args:
        mlp: gate and up as they are pruned now; down as it was before.
        settings: alpha and gamma.
        weights: of the terms.
        dtype: of the sums.
        running: see `running_dtype`.
    """

    def __init__(
        self, mlp: MLP, settings: SparseLLM, weights: Weights, dtype: torch.dtype, running: torch.dtype
    ) -> None:
        self.mlp, self.settings, self.weights, self.dtype = mlp, settings, weights, dtype
        down = mlp.down.weight.to(dtype)
        self.down = cast(mlp.down, running)
        self.ratio = weights.hidden / weights.output
        self.inverse = hidden_inverse(down @ down.T, self.ratio)
        self.pull = (self.inverse @ down).to(running)
        self.goals = [Products(*x.weight.shape, dtype=dtype, device=down.device) for x in mlp.first]
        self.squares = torch.zeros(4, dtype=torch.float64, device=down.device)

    def take(self, x: Tensor, y: Tensor, model: Tensor, auxiliary: Tensor) -> None:
        """Step on a few tokens.

        Args:
            x: (tokens, hidden).
            y: (tokens, hidden).
            model: what gate and up give for x, (tokens, 2 * channels), or (tokens, channels).
            auxiliary: s beside z, the same shape; on any device, in any dtype. Modified.
        """
        here = auxiliary.to(model.device)
        channels = self.mlp.channels(here.to(model.dtype))
        gap = y.to(self.dtype) - apply(self.down, channels)
        correction, left = correct_p(gap, self.pull, self.inverse, self.ratio)
        self.squares[3] += left.square_().sum()
        for part in zip(*(slices(x) for x in (channels, correction, model, here)), strict=True):
            self._step_z_and_s(*part)
        wanted = here.split([len(layer.weight) for layer in self.mlp.first], dim=1)
        for goal, part in zip(self.goals, wanted, strict=True):
            goal.update(part, x)
        if here is not auxiliary:
            auxiliary.copy_(here)

    def _step_z_and_s(self, channels: Tensor, correction: Tensor, model: Tensor, auxiliary: Tensor) -> None:
        f, weights = self.mlp.activation, self.weights
        p = channels.to(self.dtype) + correction
        model, work = model.to(self.dtype), auxiliary.to(self.dtype)
        if self.mlp.gated:
            (gate, up), (model_gate, model_up) = work.chunk(2, dim=1), model.chunk(2, dim=1)
            up.copy_(step_z(f(gate), model_up, p, weights.up, weights.hidden))
            s, active = step_s(f, gate, model_gate, p, up, weights.gate, weights.hidden)
            gate.copy_(s)
            residuals = {0: gate - model_gate, 1: up - model_up, 2: active.mul_(up).sub_(p)}
        else:
            one = torch.ones((), dtype=self.dtype, device=model.device)
            s, active = step_s(f, work, model, p, one, weights.up, weights.hidden)
            work.copy_(s)
            residuals = {1: work - model, 2: active.sub_(p)}
        for term, residual in residuals.items():
            self.squares[term] += residual.square_().sum()
        if work is not auxiliary:
            auxiliary.copy_(work)

    def pool(self) -> None:
        """Count the tokens of all ranks, once it was taken on all of them."""
        ranks.pool(*self.goals)
        ranks.summed(self.squares)

    def result(self) -> tuple[float, dict[str, float]]:
        """The objective after the step, and its terms: of p, z and s before they are rounded to be stored.

        Raises:
            FloatingPointError: it is not finite.
        """
        settings, weights = self.settings, self.weights
        per_token = (self.squares / self.goals[0].tokens).tolist()
        objective = float(sum(w * q for w, q in zip(weights, per_token, strict=True)))
        if not math.isfinite(objective):
            raise FloatingPointError("the objective is not finite")
        scale = (settings.alpha, settings.alpha, settings.gamma, 1.0)
        terms = {
            name: weight * square / share
            for name, weight, square, share in zip(weights._fields, weights, per_token, scale, strict=True)
            if name != "gate" or self.mlp.gated
        }
        return objective, terms
