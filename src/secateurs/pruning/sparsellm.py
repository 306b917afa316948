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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateurs.device import multiplies_bfloat16
from secateurs.pattern import Pattern
from secateurs.pruning.admm import ADMM
from secateurs.pruning.report import Iterate
from secateurs.pruning.solver import Solver, rounded, working_dtype
from secateurs.pruning.statistics import Products, Statistics

CHUNK = 2048
"""Tokens that are multiplied at once."""

SLICE = 128
"""Tokens that are worked on elementwise at once on a processor, whose cache then holds all in between."""

HELD_OUT = 8
"""One token in so many chooses among the iterates."""

Activation = Callable[[Tensor], Tensor]


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

    def stacked(self) -> Linear:
        """Those of `first` as one layer, a copy: one product is faster than two and their concatenation."""
        if len(self.first) == 1:
            return self.first[0]
        weight = torch.cat([layer.weight for layer in self.first])
        if all(layer.bias is None for layer in self.first):
            return Linear(weight, None, None)
        biases = [weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in self.first]
        return Linear(weight, torch.cat(biases), None)

    def channels(self, preactivations: Tensor) -> Tensor:
        """What down reads, (tokens, channels).

        Args:
            preactivations: what `first` gives, (tokens, channels), or (tokens, 2 * channels): gate, then up.
        """
        if not self.gated:
            return self.activation(preactivations)
        gate, up = preactivations.chunk(2, dim=1)
        return self.activation(gate) * up


class Pruned(NamedTuple):
    """A linear layer after pruning."""

    layer: Linear
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
        ValueError: a solver that is not local, iterations that are no whole number or below 0, a ratio or
            damping that is not positive.
    """

    solver: Solver = field(default_factory=ADMM)
    iterations: int = 4
    alpha: float = 0.3
    gamma: float = 0.3
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not hasattr(self.solver, "solve"):
            raise ValueError("the solver inside SparseLLM is a local one: admm, or in Python ADMM()")
        if not isinstance(self.iterations, int) or self.iterations < 0:
            raise ValueError(f"iterations is a whole number, not {self.iterations!r}")
        for name in ("alpha", "gamma", "damping"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")

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
        self.dtype, self.device = working_dtype(mlp.down.weight), mlp.down.weight.device
        self.running = running_dtype(mlp, tokens.inputs[0], self.dtype, self.device)
        self.solving, self.held_out = rows_of(tokens.inputs, hold_out=settings.iterations > 0)
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
        if self.settings.iterations:
            self.auxiliary = [
                x.new_empty(len(rows), outputs)
                for x, rows in zip(self.tokens.inputs, self.solving, strict=True)
            ]
        first = _cast(self.dense.stacked(), self.running)
        for x, y, *auxiliary in self._chunks(self.solving, *([self.auxiliary] if self.auxiliary else [])):
            self.moments.update(x)
            before = _apply(first, x)
            halves = before.chunk(2, dim=1) if self.dense.gated else (before, before)
            parts = (*halves, self.dense.channels(before), y)
            energy += torch.stack([_squares(part, self.dtype) for part in parts])
            if auxiliary:
                auxiliary[0].copy_(before)
        tiny = torch.finfo(torch.float32).tiny
        per_token = (energy / self.moments.tokens).clamp_min(tiny).tolist()
        alpha, gamma = self.settings.alpha, self.settings.gamma
        return Weights(*(w / e for w, e in zip((alpha, alpha, gamma, 1.0), per_token, strict=True)))

    def solution(self) -> MLPSolution:
        iterations = self.settings.iterations
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
        return tuple(
            prune_linear(settings.solver, layer, self.moments, goal, settings.damping)
            for layer, goal in zip(mlp.first, goals, strict=True)
        )

    def _prune_down(self, mlp: MLP, step: "_Step | None") -> Pruned:
        """Prune down, fitted to what the pruned gate and up give, from where the dense one is. The step, if
        there is one, is taken on the way."""
        settings, down = self.settings, self.dense.down
        moments = Statistics(down.weight.shape[1], dtype=self.dtype, device=self.device)
        products = Products(*down.weight.shape, dtype=self.dtype, device=self.device)
        first = _cast(mlp.stacked(), self.running)
        for x, y, *auxiliary in self._chunks(self.solving, *([self.auxiliary] if step else [])):
            before = _apply(first, x)
            if step:
                step.take(x, y, before, auxiliary[0])
            channels = mlp.channels(before)
            moments.update(channels)
            products.update(y, channels)
        return prune_linear(settings.solver, down, moments, products, settings.damping)

    def _held_out_error(self, mlp: MLP) -> float:
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        first, down = _cast(mlp.stacked(), self.running), _cast(mlp.down, self.running)
        for x, y in self._chunks(self.held_out):
            output = _apply(down, mlp.channels(_apply(first, x)))
            squares += torch.stack([_squares(output.sub_(y), self.dtype), _squares(y, self.dtype)])
        lost, energy = squares.tolist()
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
        self.down = _cast(mlp.down, running)
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
        gap = y.to(self.dtype) - _apply(self.down, channels)
        correction, left = correct_p(gap, self.pull, self.inverse, self.ratio)
        self.squares[3] += left.square_().sum()
        for part in zip(*(_slices(x) for x in (channels, correction, model, here)), strict=True):
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
        return Pruned(layer, 0.0, ())
    dense = _cast(layer, moments.mean.dtype)
    if dense.bias is None:
        inputs, mean = moments, None
        wanted = None if goal is None else goal.moment
    else:
        inputs = moments.centred()
        mean = torch.addmv(dense.bias, dense.weight, moments.mean) if goal is None else goal.mean
        wanted = None if goal is None else torch.addr(goal.moment, mean, moments.mean, alpha=-1)
    weight = dense.weight if wanted is None else inputs.fit(dense.weight, wanted, damping)
    solution = solver.solve(weight, inputs, layer.pattern)
    sparse = rounded(solution.weight, layer.weight.dtype)
    bias = None
    if layer.bias is not None and mean is not None:
        made_up = torch.addmv(mean, sparse.to(mean.dtype), moments.mean, alpha=-1)
        bias = rounded(made_up, layer.bias.dtype)
    error = inputs.error(weight, sparse.to(weight.dtype))
    return Pruned(Linear(sparse, bias, layer.pattern), error, solution.objective)


def rows_of(inputs: Sequence[Tensor], *, hold_out: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of each batch to solve on, and those held out: every eighth, counted through all batches.

    Args:
        inputs: one tensor (tokens, hidden) for every batch.
        hold_out: whether any are held out.

    Raises:
        FloatingPointError: there are too few tokens to hold any out.
    """
    solving, held = [], []
    seen = 0
    for x in inputs:
        rows = torch.arange(len(x), device=x.device)
        out = (rows + seen) % HELD_OUT == HELD_OUT - 1 if hold_out else torch.zeros_like(rows).bool()
        seen += len(x)
        solving.append(rows[~out])
        held.append(rows[out])
    if hold_out and seen < HELD_OUT:
        raise FloatingPointError(
            f"{seen} calibration tokens are too few for iterations: give {HELD_OUT} or more"
        )
    return solving, held


def hidden_inverse(gram: Tensor, ratio: float) -> Tensor:
    """(Wd Wd^T + ratio I)^-1, (hidden, hidden).

    Where it is singular in the dtype that is computed in, all of it is NaN, and so is the objective of the
    step that uses it: the iterations end, and what was pruned until then stands.

    Args:
        gram: Wd Wd^T, (hidden, hidden); modified.
        ratio: gamma.
    """
    gram.diagonal().add_(ratio)
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.full_like(gram, torch.nan) if failed else torch.cholesky_inverse(factor)


def correct_p(gap: Tensor, pull: Tensor, inverse: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """What to add to q = f(s) z for the p that lowers gamma |p - q|^2 + |Y - Wd p|^2 most, and the Y - Wd p
    that it leaves.

    By the matrix inversion lemma that p is q + Wd^T (Wd Wd^T + gamma I)^-1 (Y - Wd q): a system of the hidden
    size, where the paper's (Wd^T Wd + gamma I)^-1 (Wd^T Y + gamma q) has one of the channels'. What it leaves
    is gamma (Wd Wd^T + gamma I)^-1 (Y - Wd q).

    Args:
        gap: Y - Wd q, (tokens, hidden).
        pull: (Wd Wd^T + gamma I)^-1 Wd, (hidden, channels), in a dtype to multiply in: as its parts are far
            larger than itself, it is computed beforehand, in full precision.
        inverse: `hidden_inverse` of Wd Wd^T, (hidden, hidden).
        ratio: gamma, as it was given there.

    Returns:
        (tokens, channels) and (tokens, hidden).
    """
    return gap.to(pull.dtype) @ pull, (gap @ inverse).mul_(ratio)


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

    The lowest there is for ReLU, as the better of two branches; for smooth activations a Gauss-Newton step
    where it helps; where it does not, s stays.

    Args:
        activation: f.
        start: s before; nowhere is the result worse.
        model: m.
        p: the input of down.
        z: that multiplies f(s); 1 for an MLP without a gate.
    """

    def value(away: Tensor, missed: Tensor) -> Tensor:
        return away.square().mul_(alpha).addcmul_(missed, missed, value=gamma)

    if isinstance(activation, nn.ReLU):
        off = model.clamp_max(0)
        on = ((alpha * model + gamma * z * p) / (alpha + gamma * z * z)).clamp_min_(0)
        s = torch.where(value(off - model, p) < value(on - model, p - on * z), off, on)
        return s, s.clamp_min(0)
    active, slope = _value_and_slope(activation, start)
    away, missed, tilt = start - model, torch.addcmul(p, active, z, value=-1), slope.mul_(z)
    now = value(away, missed)
    step = away.mul_(alpha).addcmul_(missed, tilt, value=-gamma).div_(tilt.square_().mul_(gamma).add_(alpha))
    there = start - step
    active_there = activation(there)
    better = value(there - model, torch.addcmul(p, active_there, z, value=-1)) < now
    return torch.where(better, there, start), torch.where(better, active_there, active)


def _value_and_slope(activation: Activation, s: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        active = activation(s)
        (slope,) = torch.autograd.grad(active.sum(), s)
    return active.detach(), slope


def running_dtype(mlp: MLP, tokens: Tensor, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What tokens run through the MLP in, are multiplied in to be summed, and p is corrected in.

    bfloat16 where the model runs and is stored in it and the device is fast at it; otherwise `dtype`, as for
    the sums themselves and for the steps of z and s in any case.
    """
    dtypes = {tokens.dtype, *(layer.weight.dtype for layer in (*mlp.first, mlp.down))}
    return torch.bfloat16 if dtypes == {torch.bfloat16} and multiplies_bfloat16(device) else dtype


def _cast(layer: Linear, dtype: torch.dtype) -> Linear:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return replace(layer, weight=layer.weight.to(dtype), bias=bias)


def _squares(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Their sum, in this dtype, by slices that are converted in the cache. (On a processor `vector_norm` adds
    them up one by one, and loses some.)"""
    return torch.stack([part.to(dtype).square().sum() for part in _slices(tensor)]).sum()


def _slices(tensor: Tensor) -> tuple[Tensor, ...]:
    """Rows of it that are to be worked on at once, elementwise."""
    return tensor.split(SLICE if tensor.device.type == "cpu" else CHUNK // 4)


def _apply(layer: Linear, inputs: Tensor) -> Tensor:
    return nn.functional.linear(inputs, layer.weight, layer.bias)
