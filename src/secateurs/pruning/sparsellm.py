"""SparseLLM (Bai et al., arXiv 2402.17946): a block's MLP pruned as one problem.

Over calibration tokens X (the MLP's input) and Y (what its output ought to be), with auxiliary variables s
and z for the pre-activations of gate and up and p for the input of down, the method lowers

    alpha |s - Wg X|^2 + alpha |z - Wu X|^2 + gamma |p - f(s) z|^2 + |Y - Wd p|^2    (the paper's equation 5)

over the sparse weights and over p, z and s in turn; biases are left out here for brevity, and an MLP without
a gate has p - f(z). What differs from the published code:

- Each term is relative to its energy in the dense model: alpha and gamma mean the same for every model.
- Weights are fitted by a ridge step from where they are, which never raises their term; there is no
  pseudo-inverse of activations, only second moments that are summed as tokens stream by.
- p is found in a system of the hidden size, s (and z without a gate) by safeguarded Newton steps.
- Down is fitted to what the pruned gate and up really give, and the iterate is kept that is best on tokens
  that none of its weights were fitted to.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateurs.pattern import Pattern
from secateurs.pruning.admm import ADMM
from secateurs.pruning.report import Iterate
from secateurs.pruning.solver import Solver, rounded, working_dtype
from secateurs.pruning.statistics import Products, Statistics

CHUNK = 1024
"""Tokens that are worked on at once."""

HELD_OUT = 8
"""One token in so many chooses among the iterates."""

NEWTON_STEPS = 2
"""Of s in every iteration: it goes on in the next from where it is."""

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """A linear layer of an MLP.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        pattern: which of its weights may stay; None leaves the layer as it is.
    """

    weight: Tensor
    bias: Tensor | None
    pattern: Pattern | None


@dataclass(frozen=True)
class MLP:
    """down(f(gate x) * up x), or down(f(up x)).

    Args:
        first: the layers that read x: gate and up, in this order; or one layer, up or both of them fused.
        down: the layer that reads the channels.
        gated: whether there is a gate.
        activation: f.
    """

    first: tuple[Linear, ...]
    down: Linear
    gated: bool
    activation: Activation

    def preactivations(self, inputs: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens, channels), or (tokens, 2 * channels): gate, then up."""
        return torch.cat([_apply(layer, inputs) for layer in self.first], dim=1)

    def channels(self, preactivations: Tensor) -> Tensor:
        """What down reads, (tokens, channels)."""
        if not self.gated:
            return self.activation(preactivations)
        gate, up = preactivations.chunk(2, dim=1)
        return self.activation(gate) * up


class Pruned(NamedTuple):
    """A linear layer after pruning."""

    layer: Linear
    """With weight and bias in the dtype they are stored in."""
    error: float
    """What pruning lost of the fitted layer's output (`Statistics.error`)."""
    objective: tuple[float, ...]
    """Of the solver."""


@dataclass(frozen=True)
class MLPSolution:
    """A pruned MLP."""

    first: tuple[Pruned, ...]
    down: Pruned
    iterates: list[Iterate]
    """Empty where no iterations were asked for."""
    kept: int
    """Which of the iterates this is."""


class Tokens(NamedTuple):
    """Calibration tokens: one tensor of each kind for every batch."""

    inputs: list[Tensor]
    """X, (tokens, hidden)."""
    targets: list[Tensor]
    """Y, (tokens, hidden)."""


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
        iterations: after the first pruning; with none, down is fitted to the pruned gate and up, and no more.
        alpha: weight of the pre-activations' terms, relative to the output's.
        gamma: weight of the hidden term, relative to the output's.
        damping: of the fits, that of o among them, as a share of the mean of H's diagonal.

    Raises:
        ValueError: a solver that is not local, iterations below 0, a ratio or damping that is not positive.
    """

    solver: Solver = field(default_factory=ADMM)
    iterations: int = 4
    alpha: float = 0.3
    gamma: float = 0.3
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not hasattr(self.solver, "solve"):
            raise ValueError("the solver inside SparseLLM is a local one: admm, or in Python ADMM()")
        if self.iterations < 0:
            raise ValueError(f"iterations is a number, not {self.iterations}")
        for name in ("alpha", "gamma", "damping"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")

    @torch.no_grad()
    def prune(self, mlp: MLP, tokens: Tokens, *, stored: torch.dtype) -> MLPSolution:
        """Prune an MLP.

        Memory: beside the tokens, s and z in the dtype of the inputs, and of the sums over tokens one matrix
        (channels, channels) with the solver's factors of it, and one (hidden, hidden).

        Args:
            mlp: its dense layers; not modified.
            tokens: what it reads, and what its output ought to be; on any device.
            stored: dtype in which the weights will be saved: what is scored and propagated is rounded to it.

        Raises:
            FloatingPointError: the weights or tokens hold NaN or Inf, or the solver gives some. (In a later
                iteration that only ends them.)
        """
        return _Run(self, mlp, tokens, stored).solution()


class _Run:
    """The iterations on one MLP."""

    def __init__(self, settings: SparseLLM, mlp: MLP, tokens: Tokens, stored: torch.dtype) -> None:
        self.settings, self.stored = settings, stored
        self.dtype, self.device = working_dtype(mlp.down.weight), mlp.down.weight.device
        self.dense = replace(
            mlp,
            first=tuple(self._converted(layer) for layer in mlp.first),
            down=self._converted(mlp.down),
        )
        self.tokens, self.held_out = held_out(tokens) if settings.iterations else (tokens, tokens)
        self.moments = Statistics(mlp.first[0].weight.shape[1], dtype=self.dtype, device=self.device)
        self.auxiliary: list[Tensor] = []  # s above z, for every batch
        self.weights = self._measure()

    def _converted(self, layer: Linear) -> Linear:
        bias = None if layer.bias is None else layer.bias.to(self.dtype)
        return replace(layer, weight=layer.weight.to(self.dtype), bias=bias)

    def _chunks(self, tokens: Tokens, *more: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Views of a few tokens at a time."""
        for batch in zip(tokens.inputs, tokens.targets, *more, strict=True):
            yield from zip(*(tensor.split(CHUNK) for tensor in batch), strict=True)

    def _read(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _measure(self) -> Weights:
        """Take in X, start s and z where the dense MLP has them, weigh the terms by their energy there."""
        energy = torch.zeros(4, dtype=torch.float64)
        rows = sum(len(layer.weight) for layer in self.dense.first)
        if self.settings.iterations:
            self.auxiliary = [x.new_empty(len(x), rows) for x in self.tokens.inputs]
        for x, y, *s in self._chunks(self.tokens, *([self.auxiliary] if self.auxiliary else [])):
            self.moments.update(x)
            before = self.dense.preactivations(self._read(x))
            halves = before.chunk(2, dim=1) if self.dense.gated else (before, before)
            for i, part in enumerate((*halves, self.dense.channels(before), self._read(y))):
                energy[i] += part.square().sum().cpu()
            if s:
                s[0].copy_(before)
        tiny = torch.finfo(torch.float32).tiny
        per_token = (energy / self.moments.tokens).clamp_min(tiny).tolist()
        alpha, gamma = self.settings.alpha, self.settings.gamma
        return Weights(*(w / e for w, e in zip((alpha, alpha, gamma, 1.0), per_token, strict=True)))

    def solution(self) -> MLPSolution:
        iterates: list[Iterate] = []
        best: tuple[float, MLPSolution] | None = None
        mlp = self.dense
        objective: float | None = None
        terms: dict[str, float] = {}
        goals: Sequence[Products | None] = [None] * len(mlp.first)
        for k in range(self.settings.iterations + 1):
            try:
                if k:
                    objective, terms, goals = self._settle(mlp)
                first = self._prune_first(mlp, goals)
                mlp = replace(self.dense, first=tuple(self._converted(pruned.layer) for pruned in first))
                down = self._prune_down(mlp)
                mlp = replace(mlp, down=self._converted(down.layer))
                solution = MLPSolution(first, down, iterates, k)
                if not self.settings.iterations:
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
        return tuple(
            prune_linear(settings.solver, layer, self.moments, goal, settings.damping, self.stored)
            for layer, goal in zip(mlp.first, goals, strict=True)
        )

    def _prune_down(self, mlp: MLP) -> Pruned:
        """Prune down, fitted to what the pruned gate and up give."""
        settings, down = self.settings, mlp.down
        moments = Statistics(down.weight.shape[1], dtype=self.dtype, device=self.device)
        products = Products(*down.weight.shape, dtype=self.dtype, device=self.device)
        for x, y in self._chunks(self.tokens):
            channels = mlp.channels(mlp.preactivations(self._read(x)))
            moments.update(channels)
            products.update(self._read(y), channels)
        return prune_linear(settings.solver, down, moments, products, settings.damping, self.stored)

    def _settle(self, mlp: MLP) -> tuple[float, dict[str, float], list[Products]]:
        """Step p, z and s once: the objective then, its terms, and the products to fit gate and up by."""
        weights = self.weights
        down = mlp.down.weight
        gram = down @ down.T
        system = hidden_system(gram, weights.hidden / weights.output)
        goals = [Products(*x.weight.shape, dtype=self.dtype, device=self.device) for x in mlp.first]
        squares = torch.zeros(4, dtype=torch.float64, device=self.device)
        for x, y, stored in self._chunks(self.tokens, self.auxiliary):
            inputs = self._read(x)
            model, before = mlp.preactivations(inputs), self._read(stored)
            channels = mlp.channels(before)
            p, left = step_p(channels, self._read(y) - _apply(mlp.down, channels), down, gram, system)
            if mlp.gated:
                gate, up = before.chunk(2, dim=1)
                model_gate, model_up = model.chunk(2, dim=1)
                up = step_z(mlp.activation(gate), model_up, p, weights.up, weights.hidden)
                gate, active = step_s(mlp.activation, gate, model_gate, p, up, weights.gate, weights.hidden)
                after, channels = torch.cat([gate, up], dim=1), active * up
                residuals = (gate - model_gate, up - model_up, p - channels, left)
            else:
                one = torch.ones((), dtype=self.dtype, device=self.device)
                after, channels = step_s(mlp.activation, before, model, p, one, weights.up, weights.hidden)
                residuals = (torch.zeros_like(one), after - model, p - channels, left)
            squares += torch.stack([residual.square_().sum() for residual in residuals])
            stored.copy_(after)
            for goal, wanted in zip(
                goals, after.split([len(x.weight) for x in mlp.first], dim=1), strict=True
            ):
                goal.update(wanted, inputs)
        per_token = (squares / self.moments.tokens).tolist()
        objective = float(sum(w * q for w, q in zip(weights, per_token, strict=True)))
        scale = (self.settings.alpha, self.settings.alpha, self.settings.gamma, 1.0)
        terms = {
            name: weight * square / share
            for name, weight, square, share in zip(weights._fields, weights, per_token, scale, strict=True)
            if name != "gate" or mlp.gated
        }
        if not math.isfinite(objective):
            raise FloatingPointError("the objective is not finite")
        return objective, terms, goals

    def _held_out_error(self, mlp: MLP) -> float:
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for x, y in self._chunks(self.held_out):
            target = self._read(y)
            output = _apply(mlp.down, mlp.channels(mlp.preactivations(self._read(x))))
            squares += torch.stack([output.sub_(target).square_().sum(), target.square().sum()])
        lost, energy = squares.tolist()
        error = lost / energy if energy > 0 else 0.0
        if not math.isfinite(error):
            raise FloatingPointError("the output of the pruned MLP is not finite on the calibration text")
        return error


def prune_linear(
    solver: Solver,
    layer: Linear,
    moments: Statistics,
    goal: Products | None,
    damping: float,
    stored: torch.dtype,
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
        stored: dtype of the result.
    """
    if layer.pattern is None:
        bias = None if layer.bias is None else rounded(layer.bias, stored)
        return Pruned(Linear(rounded(layer.weight, stored), bias, None), 0.0, ())
    if layer.bias is None:
        weight = layer.weight if goal is None else moments.fit(layer.weight, goal.moment, damping)
        solution = solver.solve(weight, moments, layer.pattern)
        sparse = rounded(solution.weight, stored)
        pruned = replace(layer, weight=sparse)
        return Pruned(pruned, moments.error(weight, sparse.to(weight.dtype)), solution.objective)
    centred = moments.centred()
    if goal is None:
        weight, mean = layer.weight, torch.addmv(layer.bias, layer.weight, moments.mean)
    else:
        deviations = torch.addr(goal.moment, goal.mean, moments.mean, alpha=-1)
        weight, mean = centred.fit(layer.weight, deviations, damping), goal.mean
    solution = solver.solve(weight, centred, layer.pattern)
    sparse = rounded(solution.weight, stored)
    bias = rounded(torch.addmv(mean, sparse.to(mean.dtype), moments.mean, alpha=-1), stored)
    pruned = Linear(sparse, bias, layer.pattern)
    return Pruned(pruned, centred.error(weight, sparse.to(weight.dtype)), solution.objective)


def held_out(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Tokens to solve on, and every eighth, counted through all batches, which is held out.

    Raises:
        FloatingPointError: there are too few tokens to hold any out.
    """
    solving, held = Tokens([], []), Tokens([], [])
    seen = 0
    for x, y in zip(*tokens, strict=True):
        out = torch.arange(seen, seen + len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
        seen += len(x)
        for part, where in ((solving, ~out), (held, out)):
            part.inputs.append(x[where])
            part.targets.append(y[where])
    if seen < HELD_OUT:
        raise FloatingPointError(
            f"{seen} calibration tokens are too few for iterations: give {HELD_OUT} or more"
        )
    return solving, held


def hidden_system(gram: Tensor, ratio: float) -> Tensor:
    """The Cholesky factor of Wd Wd^T + ratio I, (hidden, hidden).

    Args:
        gram: Wd Wd^T, (hidden, hidden).
        ratio: gamma.

    Raises:
        FloatingPointError: it is singular in the dtype that is computed in, or holds NaN or Inf.
    """
    system = gram.clone()
    system.diagonal().add_(ratio)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise FloatingPointError("the system for the input of down is not positive definite")
    return factor


def step_p(
    channels: Tensor, gap: Tensor, down: Tensor, gram: Tensor, system: Tensor
) -> tuple[Tensor, Tensor]:
    """The p that lowers gamma |p - q|^2 + |Y - Wd p|^2 most, and the Y - Wd p that it leaves.

    By the matrix inversion lemma it is q + Wd^T (Wd Wd^T + gamma I)^-1 (Y - Wd q): a system of the hidden
    size, where the paper's (Wd^T Wd + gamma I)^-1 (Wd^T Y + gamma q) has one of the channels'. What it leaves
    is found in the hidden size too.

    Args:
        channels: q = f(s) z, (tokens, channels).
        gap: Y - Wd q, (tokens, hidden).
        down: Wd, (hidden, channels).
        gram: Wd Wd^T, (hidden, hidden).
        system: `hidden_system` of both.
    """
    solution = torch.cholesky_solve(gap.T, system).T
    return torch.addmm(channels, solution, down), torch.addmm(gap, solution, gram, alpha=-1)


def step_z(active: Tensor, model: Tensor, p: Tensor, alpha: float, gamma: float) -> Tensor:
    """The z that lowers alpha (z - m)^2 + gamma (p - f(s) z)^2 most, elementwise.

    Args:
        active: f(s).
        model: m = Wu x + bu.
        p: the input of down.
    """
    return (alpha * model + gamma * active * p) / (alpha + gamma * active.square())


def step_s(
    activation: Activation, start: Tensor, model: Tensor, p: Tensor, z: Tensor, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """An s that lowers alpha (s - m)^2 + gamma (p - f(s) z)^2, elementwise, and f(s).

    The lowest there is for ReLU, as the better of two branches; for smooth activations a few Gauss-Newton
    steps, each of which is taken where it helps, and shortened where it does not.

    Args:
        activation: f.
        start: s before; nowhere is the result worse.
        model: m.
        p: the input of down.
        z: that multiplies f(s); 1 for an MLP without a gate.
    """

    def value(s: Tensor, active: Tensor) -> Tensor:
        return (s - model).square_().mul_(alpha).add_((p - active * z).square_(), alpha=gamma)

    if isinstance(activation, nn.ReLU):
        off = model.clamp_max(0)
        on = ((alpha * model + gamma * z * p) / (alpha + gamma * z * z)).clamp_min_(0)
        s = torch.where(value(off, torch.zeros_like(off)) < value(on, on), off, on)
        return s, s.clamp_min(0)
    s, (active, slope) = start.clone(), _value_and_slope(activation, start)
    now, shorten = value(s, active), torch.ones_like(s)
    for left in reversed(range(NEWTON_STEPS)):
        tilt = slope * z
        there = (model - s).mul_(alpha).add_((active * z).sub_(p).mul_(tilt), alpha=-gamma)
        there.div_(tilt.square_().mul_(gamma).add_(alpha)).mul_(shorten).add_(s)
        if left:
            active_there, slope_there = _value_and_slope(activation, there)
        else:
            active_there = activation(there)
        value_there = value(there, active_there)
        better = value_there < now
        torch.where(better, there, s, out=s)
        torch.where(better, active_there, active, out=active)
        if left:
            torch.where(better, slope_there, slope, out=slope)
            torch.where(better, value_there, now, out=now)
            shorten.mul_(0.25).masked_fill_(better, 1)
    return s, active


def _value_and_slope(activation: Activation, s: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        active = activation(s)
        (slope,) = torch.autograd.grad(active.sum(), s)
    return active.detach(), slope


def _apply(layer: Linear, inputs: Tensor) -> Tensor:
    return nn.functional.linear(inputs, layer.weight, layer.bias)
