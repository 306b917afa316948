"""The same on a GPU as on the CPU; skipped where there is none."""

from pathlib import Path

import pytest
import torch
from problems import correlated_inputs, weight_of
from torch import nn

import secateurs
from secateurs import ADMM, NM, SparseGPT, SparseLLM, Statistics, Unstructured, Wanda
from secateurs.demo import CALIBRATION, HELD_OUT, MODEL
from secateurs.pattern import kth_smallest
from secateurs.pruning.mlp.linear import Linear
from secateurs.pruning.mlp.problem import MLP, Tokens
from secateurs.pruning.solvers.solver import Solver
from secateurs.pruning.solvers.statistics import Products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_precision_inputs(dtype: torch.dtype) -> None:
    inputs = correlated_inputs(600, 300).div(100).to(dtype)
    targets = weight_of(600, 40).to(dtype)
    moments, products = Statistics(300, device="cuda"), Products(40, 300, device="cuda")
    for x, y in zip(inputs.split(250), targets.split(250), strict=True):
        moments.update(x.cuda())
        products.update(y.cuda(), x.cuda())
    x, y = inputs.double(), targets.double()
    for found, expected in ((moments.moment, x.T @ x / 600), (products.moment, y.T @ x / 600)):
        assert (found.cpu() - expected).norm() < 1e-5 * expected.norm()
    torch.testing.assert_close(moments.mean.cpu().double(), x.mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products.mean.cpu().double(), y.mean(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
@pytest.mark.parametrize("solver", [SparseGPT(), Wanda(), ADMM()], ids=lambda x: type(x).__name__)
def test_solvers(solver: Solver, pattern: Unstructured | NM) -> None:
    inputs, weight = correlated_inputs(400, 160), weight_of(48, 160)
    expected = solver.solve(weight, Statistics.from_inputs(inputs), pattern).weight
    found = solver.solve(weight.cuda(), Statistics.from_inputs(inputs.cuda()), pattern).weight
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-8)


def test_the_kth_of_many() -> None:
    values = torch.rand(300_000).mul(1000).round().cuda()
    for k in (1, 1000, 210_000, 300_000):
        assert kth_smallest(values, k) == values.sort().values[k - 1]


@pytest.mark.parametrize("gated", [True, False])
def test_sparsellm(gated: bool) -> None:
    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        pattern = Unstructured(0.5)

        def layer(outputs: int, inputs: int, seed: int) -> Linear:
            weight, bias = weight_of(outputs, inputs, seed=seed) / 4, weight_of(1, outputs, seed=seed + 1)[0]
            return Linear(weight.to(device, dtype), bias.to(device, dtype), pattern)

        first = tuple(layer(48, 24, seed) for seed in range(1 + gated))
        mlp = MLP(first, layer(24, 48, 7), gated, nn.SiLU())
        inputs, targets = correlated_inputs(400, 24) / 10, weight_of(400, 24)
        tokens = Tokens([inputs.to(device, dtype)], [targets.to(device, dtype)])
        solution = SparseLLM(SparseGPT()).prune(mlp, tokens)
        assert len(solution.iterates) == 5
        return [pruned.layer.weight.cpu() for pruned in (*solution.first, solution.down)]

    for found, expected in zip(run("cuda", torch.float64), run("cpu", torch.float64), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    for found in run("cuda", torch.bfloat16):
        assert found.isfinite().all()
        assert float((found == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", ["sparsegpt", "sparsellm"])
def test_a_model_is_as_good_as_from_the_cpu(method: str, tmp_path: Path) -> None:
    from secateurs.evaluation import load_model, perplexity
    from secateurs.text import evaluation_tokens, load_tokenizer

    text = evaluation_tokens(HELD_OUT, load_tokenizer(MODEL))
    found = []
    for device in ("cuda", "cpu"):
        secateurs.prune(
            MODEL,
            output=tmp_path / device,
            calibration=CALIBRATION,
            method=method,
            pattern="70%",
            samples=8,
            length=256,
            device=device,
        )
        found.append(perplexity(load_model(tmp_path / device, "cpu"), text, length=256))
    assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
def test_a_survey_whose_activations_do_not_stay_there(
    allocation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "secateurs.pruning.allocation.survey.home_of", lambda hidden, device: torch.device("cpu")
    )
    report = secateurs.prune(
        MODEL,
        output=tmp_path / "out",
        calibration=CALIBRATION,
        method="sparsegpt",
        pattern="70%",
        allocation=allocation,
        samples=4,
        length=256,
        device="cuda",
    )
    assert report.sparsity == pytest.approx(0.7, abs=1e-4)
