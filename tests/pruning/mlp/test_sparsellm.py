"""SparseLLM against its objective, the published formulas, and a run written out in full, in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Smallest, correlated_inputs, smallest, weight_of
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

import secateurs.pruning.mlp.sparsellm
from secateurs import ADMM, Solution, SparseGPT, SparseLLM, Statistics, Unstructured
from secateurs.pattern import Pattern
from secateurs.pruning.mlp.linear import Linear, prune_linear
from secateurs.pruning.mlp.problem import MLP, Tokens, squares
from secateurs.pruning.mlp.steps import correct_p, hidden_inverse, step_s, step_z
from secateurs.pruning.solvers.statistics import Products

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (nn.ReLU(), relu),
    "silu": (nn.SiLU(), silu),
    "gelu": (nn.GELU(), gelu),
    "gelu_tanh": (nn.GELU(approximate="tanh"), lambda x: gelu(x, approximate="tanh")),
}
HIDDEN, CHANNELS, TOKENS = 12, 20, 160


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ratios = st.floats(0.01, 100)
seeds = st.integers(0, 1000)
few = settings(max_examples=40, deadline=None)


# Each step lowers the objective, written here as it stands in the paper.


@few
@given(seed=seeds, damping=st.floats(1e-4, 10), outputs=st.integers(1, 8))
def test_a_fit_never_raises_its_term(seed: int, damping: float, outputs: int) -> None:
    inputs, targets = correlated_inputs(50, 10, seed=seed), random(50, outputs, seed=seed + 1)
    weight = weight_of(outputs, 10, seed=seed + 2)
    products = Products(outputs, 10, dtype=torch.float64)
    products.update(targets, inputs)
    fitted = Statistics.from_inputs(inputs).fit(weight, products.moment, damping)
    before, after = ((targets - inputs @ w.T).square().sum() for w in (weight, fitted))
    assert after <= before * (1 + 1e-9)


def test_a_fit_is_the_ridge_solution_around_the_weights() -> None:
    inputs, targets, weight = correlated_inputs(50, 10), random(50, 6), weight_of(6, 10)
    products = Products(6, 10, dtype=torch.float64)
    for start in range(0, 50, 20):  # streamed
        products.update(targets[start : start + 20], inputs[start : start + 20])
    fitted = Statistics.from_inputs(inputs).fit(weight, products.moment, 0.1)
    ridge = 0.1 * inputs.square().mean() * len(inputs)
    rows = torch.cat([inputs, ridge.sqrt() * torch.eye(10, dtype=torch.float64)])
    goals = torch.cat([targets, ridge.sqrt() * weight.T])
    torch.testing.assert_close(fitted, torch.linalg.lstsq(rows, goals).solution.T)


@few
@given(seed=seeds, gamma=ratios)
def test_p_is_that_of_the_published_formula(seed: int, gamma: float) -> None:
    down, channels = weight_of(HIDDEN, CHANNELS, seed=seed), random(30, CHANNELS, seed=seed + 1)
    bias, targets = random(HIDDEN, seed=seed + 2), random(30, HIDDEN, seed=seed + 3)
    gap = targets - bias - channels @ down.T
    inverse = hidden_inverse(down @ down.T, gamma)
    correction, left = correct_p(gap, inverse @ down, inverse, gamma)
    p = channels + correction
    system = down.T @ down + gamma * torch.eye(CHANNELS, dtype=torch.float64)
    published = torch.linalg.solve(system, ((targets - bias) @ down + gamma * channels).T).T
    torch.testing.assert_close(p, published, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(left, targets - bias - p @ down.T, rtol=1e-6, atol=1e-8)


@few
@given(seed=seeds, alpha=ratios, gamma=ratios, name=st.sampled_from(list(ACTIVATIONS)))
def test_steps_of_z_and_s_never_raise_the_objective(seed: int, alpha: float, gamma: float, name: str) -> None:
    module, f = ACTIVATIONS[name]
    s, z, p, model_s, model_z = (3 * random(40, CHANNELS, seed=seed + i) for i in range(5))

    def terms(s: Tensor, z: Tensor) -> Tensor:
        return alpha * (s - model_s) ** 2 + alpha * (z - model_z) ** 2 + gamma * (p - f(s) * z) ** 2

    z_new = step_z(f(s), model_z, p, alpha, gamma)
    assert (terms(s, z_new) <= terms(s, z) * (1 + 1e-9) + 1e-12).all()
    s_new, active = step_s(module, s, model_s, p, z_new, alpha, gamma)
    torch.testing.assert_close(active, f(s_new))
    assert (terms(s_new, z_new) <= terms(s, z_new) * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_s_is_about_the_lowest_there_is(name: str) -> None:
    """Against a fine grid: exactly for ReLU; for smooth activations, two steps gain nearly all there is."""
    module, f = ACTIVATIONS[name]
    model, p, z = random(400, seed=1), random(400, seed=2), random(400, seed=3)
    s, _ = step_s(module, model, model, p, z, 0.5, 1.0)
    s, _ = step_s(module, s, model, p, z, 0.5, 1.0)
    grid = torch.linspace(-6, 6, 24001, dtype=torch.float64)[:, None]

    def value(s: Tensor) -> Tensor:
        return 0.5 * (s - model) ** 2 + (p - f(s) * z) ** 2

    lowest = value(grid).min(dim=0).values
    if name == "relu":
        assert (value(s) - lowest).max() < 1e-6
    else:
        assert (value(model) - value(s)).sum() > 0.9 * (value(model) - lowest).sum()


# A whole run.


def problem(activation: Callable[[Tensor], Tensor], *, gated: bool, fused: bool, bias: bool) -> MLP:
    def linear(outputs: int, inputs: int, seed: int) -> Linear:
        weight = weight_of(outputs, inputs, seed=seed) / math.sqrt(inputs)
        return Linear(weight, 0.3 * random(outputs, seed=seed + 50) if bias else None, Unstructured(0.6))

    first: tuple[Linear, ...] = (linear(CHANNELS, HIDDEN, 1),)
    if gated:
        first = (linear(2 * CHANNELS, HIDDEN, 2),) if fused else (*first, linear(CHANNELS, HIDDEN, 3))
    return MLP(first, linear(HIDDEN, CHANNELS, 4), gated, activation)


def calibration() -> Tokens:
    inputs = correlated_inputs(TOKENS, HIDDEN)
    inputs = inputs / inputs.square().mean().sqrt()
    return Tokens(list(inputs.split(64)), list(random(TOKENS, HIDDEN, seed=9).split(64)))


def bias_of(layer: Linear) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


@dataclass
class Reference:
    """SparseLLM unstreamed: all tokens in one matrix, normal equations with the damping added."""

    settings: SparseLLM
    mlp: MLP
    f: Callable[[Tensor], Tensor]
    held_out: list[float] = field(default_factory=list)
    objectives: list[float] = field(default_factory=list)

    def fit(self, weight: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        moment = inputs.T @ inputs
        ridge = self.settings.damping * moment.diagonal().mean()
        moment_damped = moment + ridge * torch.eye(len(moment), dtype=torch.float64)
        return weight + torch.linalg.solve(
            moment_damped, (targets - inputs @ weight.T).T @ inputs, left=False
        )

    def channels(self, before: Tensor) -> Tensor:
        if not self.mlp.gated:
            return self.f(before)
        return self.f(before[:, :CHANNELS]) * before[:, CHANNELS:]

    def prune(self, layer: Linear, inputs: Tensor, targets: Tensor | None) -> Linear:
        """Around the means of inputs and targets if there is a bias to hold them."""
        if targets is None:
            targets = inputs @ layer.weight.T + bias_of(layer)
        mean, goal = inputs.mean(dim=0), targets.mean(dim=0)
        if layer.bias is None:
            mean, goal = torch.zeros_like(mean), torch.zeros_like(goal)
        weight = self.fit(layer.weight, inputs - mean, targets - goal)
        pruned = smallest(weight, (inputs - mean).square().mean(dim=0).sqrt(), 0.6)
        return Linear(pruned, None if layer.bias is None else goal - pruned @ mean, layer.pattern)

    def before(self, layers: Sequence[Linear], inputs: Tensor) -> Tensor:
        return torch.cat([inputs @ layer.weight.T + bias_of(layer) for layer in layers], dim=1)

    def run(self, tokens: Tokens) -> tuple[list[Linear], Linear]:
        mine = self.settings
        x, y = torch.cat(tokens.inputs), torch.cat(tokens.targets)
        held = torch.arange(len(x)) % 8 == 7
        x, x_out, y, y_out = x[~held], x[held], y[~held], y[held]
        aux = self.before(self.mlp.first, x)
        gate, up = aux[:, :CHANNELS], aux[:, -CHANNELS:]
        weights = (mine.alpha, mine.alpha, mine.gamma, 1.0)
        energy = [part.square().sum() for part in (gate, up, self.channels(aux), y)]
        a_gate, a_up, c, d = (w / e for w, e in zip(weights, energy, strict=True))
        layers: Sequence[Linear] = self.mlp.first
        goals: Sequence[Tensor | None] = [None] * len(layers)
        results = []
        before = self.mlp.down  # p is found for down as it was before
        for _ in range(mine.iterations + 1):
            layers = [self.prune(layer, x, goal) for layer, goal in zip(layers, goals, strict=True)]
            model = self.before(layers, x)
            down = self.prune(self.mlp.down, self.channels(model), y)
            down_bias = bias_of(down)
            guess = self.channels(self.before(layers, x_out)) @ down.weight.T + down_bias
            self.held_out.append(float((y_out - guess).square().sum() / y_out.square().sum()))
            results.append((list(layers), down))
            q, wanted = self.channels(aux), y - bias_of(before)
            system = d * before.weight.T @ before.weight + c * torch.eye(CHANNELS, dtype=torch.float64)
            p = torch.linalg.solve(system, (d * wanted @ before.weight + c * q).T).T
            if self.mlp.gated:
                active = self.f(aux[:, :CHANNELS])
                up = (a_up * model[:, CHANNELS:] + c * active * p) / (a_up + c * active**2)
                gate = self.newton(aux[:, :CHANNELS], model[:, :CHANNELS], p, up, a_gate, c)
                aux = torch.cat([gate, up], dim=1)
            else:
                aux = self.newton(aux, model, p, torch.ones_like(p), a_up, c)
            gap = (aux - model) ** 2
            self.objectives.append(
                float(
                    (a_gate * gap[:, :CHANNELS].sum() if self.mlp.gated else 0)
                    + a_up * gap[:, -CHANNELS:].sum()
                    + c * (p - self.channels(aux)).square().sum()
                    + d * (wanted - p @ before.weight.T).square().sum()
                )
            )
            before = down
            goals = aux.split([len(layer.weight) for layer in layers], dim=1)
        return results[min(range(len(results)), key=lambda k: self.held_out[k])]

    def newton(self, s: Tensor, model: Tensor, p: Tensor, z: Tensor, a: Tensor, c: Tensor) -> Tensor:
        def value(s: Tensor) -> Tensor:
            return a * (s - model) ** 2 + c * (p - self.f(s) * z) ** 2

        if self.f is relu:
            off, on = model.clamp(max=0), ((a * model + c * z * p) / (a + c * z**2)).clamp(min=0)
            return torch.where(value(off) < value(on), off, on)
        slope = torch.func.vmap(torch.func.grad(self.f))(s.flatten()).view_as(s) * z
        there = s + (a * (model - s) + c * (p - self.f(s) * z) * slope) / (a + c * slope**2)
        return torch.where(value(there) < value(s), there, s)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("name", "gated", "fused"),
    [("relu", False, False), ("gelu", False, False), ("silu", True, False), ("gelu_tanh", True, True)],
)
def test_a_run_is_that_of_the_reference(
    name: str, gated: bool, fused: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secateurs.pruning.mlp.sparsellm, "CHUNK", 24)  # so that tokens really stream
    module, f = ACTIVATIONS[name]
    mlp = problem(module, gated=gated, fused=fused, bias=bias)
    method = SparseLLM(Smallest(), iterations=3, alpha=0.7, gamma=2.0)
    solution = method.prune(mlp, calibration())
    reference = Reference(method, mlp, f)
    first, down = reference.run(calibration())
    for pruned, expected in zip((*solution.first, solution.down), (*first, down), strict=True):
        torch.testing.assert_close(pruned.layer.weight, expected.weight)
        torch.testing.assert_close(pruned.layer.bias, expected.bias)
    held_out = [iterate.held_out for iterate in solution.iterates]
    assert held_out == pytest.approx(reference.held_out)
    assert solution.iterates[0].objective is None
    # The reference also steps once more, after its last pruning.
    objectives = [iterate.objective for iterate in solution.iterates[1:]]
    assert objectives == pytest.approx(reference.objectives[:-1])
    assert solution.kept == min(range(4), key=lambda k: held_out[k])
    for iterate in solution.iterates[1:]:
        weights = {"gate": 0.7, "up": 0.7, "hidden": 2.0, "output": 1.0}
        assert sum(weights[k] * v for k, v in iterate.terms.items()) == pytest.approx(iterate.objective)


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_iterations_help_tokens_that_nothing_was_fitted_to(name: str) -> None:
    mlp = problem(ACTIVATIONS[name][0], gated=name == "silu", fused=False, bias=False)
    inputs = random(1600, HIDDEN, seed=3)
    dense = mlp.channels(torch.cat([inputs @ layer.weight.T for layer in mlp.first], dim=1))
    tokens = Tokens([inputs], [dense @ mlp.down.weight.T])
    solution = SparseLLM(SparseGPT(block=8), iterations=6).prune(mlp, tokens)
    assert solution.kept > 0


def test_tokens_may_be_in_half_precision() -> None:
    """Beside the same run in float64: s and z are then rounded to bfloat16 between the iterations."""
    mlp = problem(nn.SiLU(), gated=True, fused=False, bias=True)
    half = Tokens(*([part.bfloat16() for part in parts] for parts in calibration()))
    full = Tokens(*([part.double() for part in parts] for parts in half))
    method = SparseLLM(SparseGPT(block=8), iterations=3)
    runs = [method.prune(mlp, tokens).iterates for tokens in (half, full)]
    for ours, exact in zip(*runs, strict=True):
        assert ours.held_out == pytest.approx(exact.held_out, rel=0.01)
        assert ours.terms == pytest.approx(exact.terms, rel=0.01)


@pytest.mark.parametrize("gated", [True, False])
def test_a_model_in_half_precision(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens run through the MLP in bfloat16, as through the model, beside the same run in float32.

    The mask is given, since rounding may choose another, which is as good, but not the same.
    """

    class EveryOther:
        def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
            rows, columns = (torch.arange(size) for size in weight.shape)
            return Solution(weight.masked_fill((rows[:, None] + columns) % 2 == 0, 0))

    mlp = problem(nn.SiLU(), gated=gated, fused=False, bias=True)
    inputs = random(1600, HIDDEN, seed=3).bfloat16()
    before = [inputs.double() @ layer.weight.T + bias_of(layer) for layer in mlp.first]
    targets = mlp.channels(torch.cat(before, dim=1)) @ mlp.down.weight.T + bias_of(mlp.down)
    *first, down = (replace(x, weight=x.weight.bfloat16()) for x in (*mlp.first, mlp.down))
    mlp = replace(mlp, first=tuple(first), down=down)
    runs = []
    for fast in (True, False):
        monkeypatch.setattr(
            secateurs.pruning.mlp.problem, "multiplies_bfloat16", lambda device, fast=fast: fast
        )
        method = SparseLLM(EveryOther(), iterations=3)
        runs.append(method.prune(mlp, Tokens([inputs], [targets])).iterates)
    for ours, exact in zip(*runs, strict=True):
        assert ours.held_out == pytest.approx(exact.held_out, rel=0.01)
        assert ours.objective == (exact.objective and pytest.approx(exact.objective, rel=0.01))
        for name, term in ours.terms.items():  # at first p leaves nothing of the output's, but for rounding
            noise = 2.0**-18 if name == "output" else 0
            assert term == pytest.approx(exact.terms[name], rel=0.01, abs=noise)
    assert runs[0] != runs[1]


def test_an_mlp_that_is_partly_in_half_precision_runs_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = problem(nn.SiLU(), gated=True, fused=False, bias=False)
    gate, up, down = (replace(x, weight=x.weight.bfloat16()) for x in (*mlp.first, mlp.down))
    mlp = replace(mlp, first=(replace(gate, weight=gate.weight.float()), up), down=down)
    tokens = Tokens(*([x.bfloat16() for x in tensors] for tensors in calibration()))
    runs = []
    for fast in (True, False):
        monkeypatch.setattr(
            secateurs.pruning.mlp.problem, "multiplies_bfloat16", lambda device, fast=fast: fast
        )
        runs.append(SparseLLM(Smallest(), iterations=1).prune(mlp, tokens).iterates)
    assert runs[0] == runs[1]


def test_squares_do_not_lose_what_is_small() -> None:
    tensor = 0.1 * random(2048, 4096).float()
    tensor[1000, 1000] = 2000
    for dtype in (torch.float32, torch.bfloat16):
        exact = float(tensor.to(dtype).double().square().sum())
        assert float(squares(tensor.to(dtype), torch.float32)) == pytest.approx(exact, rel=1e-6)


def test_a_step_that_cannot_be_solved_ends_the_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hidden_inverse(torch.zeros(3, 3), 0.0).isnan().all()
    monkeypatch.setattr(
        secateurs.pruning.mlp.sparsellm,
        "hidden_inverse",
        lambda gram, ratio: torch.full_like(gram, torch.nan),
    )
    mlp = problem(nn.SiLU(), gated=True, fused=False, bias=False)
    solution = SparseLLM(SparseGPT(block=8), iterations=3).prune(mlp, calibration())
    assert (len(solution.iterates), solution.kept) == (1, 0)
    for pruned in (*solution.first, solution.down):
        assert pruned.layer.weight.isfinite().all()


@pytest.mark.parametrize("solver", [SparseGPT(block=8), ADMM()])
def test_without_iterations_down_is_fitted_to_the_pruned_gate_and_up(solver: SparseGPT | ADMM) -> None:
    mlp = problem(nn.SiLU(), gated=True, fused=False, bias=False)
    mlp = replace(mlp, down=replace(mlp.down, pattern=Unstructured(0.0)))  # nothing falls: the fit itself
    tokens = calibration()
    solution = SparseLLM(solver, iterations=0, damping=1e-6).prune(mlp, tokens)
    x, y = torch.cat(tokens.inputs), torch.cat(tokens.targets)
    gate, up = (pruned.layer.weight for pruned in solution.first)
    channels = silu(x @ gate.T) * (x @ up.T)
    best = torch.linalg.lstsq(channels, y).solution
    lost, least = ((y - channels @ w).square().sum() for w in (solution.down.layer.weight.T, best))
    assert lost == pytest.approx(float(least), rel=1e-3)
    assert solution.iterates == []


def test_a_bias_makes_up_for_the_mean_of_what_is_lost() -> None:
    mlp = problem(nn.SiLU(), gated=True, fused=False, bias=True)
    tokens = calibration()
    solution = SparseLLM(Smallest(), iterations=0).prune(mlp, tokens)
    x, y = torch.cat(tokens.inputs), torch.cat(tokens.targets)
    (gate, up), down = (pruned.layer for pruned in solution.first), solution.down.layer
    for layer, dense in zip((gate, up), mlp.first, strict=True):
        lost = nn.functional.linear(x, dense.weight - layer.weight, dense.bias - layer.bias)  # type: ignore[operator]
        torch.testing.assert_close(lost.mean(dim=0), torch.zeros(CHANNELS, dtype=torch.float64))
    before = (nn.functional.linear(x, layer.weight, layer.bias) for layer in (gate, up))
    channels = silu(next(before)) * next(before)
    lost = y - nn.functional.linear(channels, down.weight, down.bias)
    torch.testing.assert_close(lost.mean(dim=0), torch.zeros(HIDDEN, dtype=torch.float64))


@pytest.mark.parametrize("solver", [SparseGPT(), ADMM()])
@pytest.mark.parametrize("constant", [1, 16])
def test_inputs_that_never_vary_are_left_to_the_bias(solver: SparseGPT | ADMM, constant: int) -> None:
    """Norm layers with a gain of zero give such inputs; in float32 their variance is all rounding."""
    inputs = correlated_inputs(600, 64).float()
    inputs[:, :constant] = 3 * random(constant, seed=5).float()
    layer = Linear(weight_of(24, 64).float(), random(24).float(), Unstructured(0.5))
    pruned = prune_linear(solver, layer, Statistics.from_inputs(inputs), None, 0.01)
    before, after = (nn.functional.linear(inputs, x.weight, x.bias) for x in (layer, pruned.layer))
    deviations = before - before.mean(dim=0)
    assert (before - after).square().sum() < 0.1 * deviations.square().sum()
    assert not pruned.layer.weight[:, :constant].any()


def test_too_few_tokens_to_hold_any_out() -> None:
    mlp = problem(nn.SiLU(), gated=True, fused=False, bias=False)
    few = Tokens([random(3, HIDDEN), random(4, HIDDEN)], [random(3, HIDDEN), random(4, HIDDEN)])
    with pytest.raises(FloatingPointError, match="7 calibration tokens are too few"):
        SparseLLM(Smallest()).prune(mlp, few)


def test_a_layer_without_pattern_stays() -> None:
    mlp = problem(nn.SiLU(), gated=True, fused=False, bias=True)
    mlp = replace(mlp, first=(mlp.first[0], replace(mlp.first[1], pattern=None)))
    solution = SparseLLM(Smallest(), iterations=2).prune(mlp, calibration())
    assert torch.equal(solution.first[1].layer.weight, mlp.first[1].weight)
    mlp = replace(mlp, down=replace(mlp.down, pattern=None))
    solution = SparseLLM(Smallest(), iterations=2).prune(mlp, calibration())
    assert torch.equal(solution.down.layer.weight, mlp.down.weight)


def test_what_is_propagated_is_what_is_stored() -> None:
    mlp = problem(nn.SiLU(), gated=True, fused=False, bias=True)
    dtypes = torch.bfloat16, torch.float32, torch.float16
    *first, down = (
        replace(layer, weight=layer.weight.to(dtype))
        for layer, dtype in zip((*mlp.first, mlp.down), dtypes, strict=True)
    )
    solution = SparseLLM(Smallest(), iterations=1).prune(
        replace(mlp, first=tuple(first), down=down), calibration()
    )
    x, y = (torch.cat(tensors)[7::8] for tensors in calibration())
    layers = (*solution.first, solution.down)
    gate, up, down = (
        lambda v, layer=part.layer: v @ layer.weight.double().T + bias_of(layer) for part in layers
    )
    lost = (down(nn.functional.silu(gate(x)) * up(x)) - y).square().sum() / y.square().sum()
    assert solution.iterates[solution.kept].held_out == pytest.approx(float(lost), rel=1e-4)
    for part, dtype in zip(layers, dtypes, strict=True):
        assert part.layer.weight.dtype == dtype
        assert bias_of(part.layer).dtype == torch.float64
        assert float((part.layer.weight == 0).float().mean()) == pytest.approx(0.6, abs=0.01)


def test_a_step_that_is_not_finite_ends_the_iterations() -> None:
    calls = 0

    @dataclass(frozen=True)
    class Breaks:
        after: int

        def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
            nonlocal calls
            calls += 1
            if calls > self.after:
                raise FloatingPointError("on purpose")
            return Smallest().solve(weight, statistics, pattern)

    mlp = problem(nn.SiLU(), gated=True, fused=False, bias=False)
    broken = SparseLLM(Breaks(7), iterations=5).prune(mlp, calibration())
    whole = SparseLLM(Smallest(), iterations=1).prune(mlp, calibration())
    assert len(broken.iterates) == 2
    assert broken.kept == whole.kept
    assert torch.equal(broken.down.layer.weight, whole.down.layer.weight)
    calls = 0
    with pytest.raises(FloatingPointError, match="on purpose"):
        SparseLLM(Breaks(1)).prune(mlp, calibration())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"iterations": -1}, "iterations is a whole number, not -1"),
        ({"iterations": 2.5}, "iterations is a whole number, not 2.5"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"gamma": math.nan}, "gamma must be above 0"),
        ({"damping": -1.0}, "damping must be above 0"),
        ({"solver": SparseLLM()}, "a local one"),
    ],
)
def test_settings_that_make_no_sense(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLLM(**settings_)  # type: ignore[arg-type]
