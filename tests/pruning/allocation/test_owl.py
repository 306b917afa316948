"""OWL against a naive float64 one on a whole model, with totals to the weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import tokens
from folders import save
from secateurs import NM, OWL, Pattern, Unstructured, parse_pattern, prune
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.pruning.allocation.survey import Patterns, Survey, layer_shapes
from table import family_of, linear_weight


def allocated(
    folder: Path, owl: OWL, budget: Pattern, text: Tensor | None
) -> tuple[Patterns, dict[str, int]]:
    model = BlockwiseModel(Checkpoint(folder), torch.device("cpu"))
    seen: list[str] = []
    patterns = owl.allocate(Survey(model, text, 2, seen.append), budget)
    sizes = {name: out * width for name, (out, width) in layer_shapes(model).items()}
    assert seen == list(patterns) == list(sizes)
    return patterns, sizes


def pruned(patterns: Patterns, sizes: dict[str, int]) -> int:
    return sum(round(pattern.sparsity * sizes[name]) for name, pattern in patterns.items() if pattern)


def naive_shares(folder: Path, owl: OWL, text: Tensor) -> dict[str, float]:
    """Outliers of each layer's unit, from a whole model in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    scores: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        def note(layer: Any, inputs: tuple[Tensor]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            scores[name] = linear_weight(layer).detach().abs() * x.square().sum(0).sqrt()

        return note

    blocks = family_of(model.config).blocks
    for index in range(len(model.get_submodule(blocks))):
        for group in family_of(model.config).groups:
            for name in group:
                path = f"{blocks}.{index}.{name}"
                model.get_submodule(path).register_forward_pre_hook(listen(path))
    with torch.no_grad():
        model(text)
    shares = {}
    for name in scores:
        block = name.removeprefix(blocks + ".").split(".")[0]
        unit = [
            score.flatten()
            for other, score in scores.items()
            if other == name or (owl.level == "block" and other.startswith(f"{blocks}.{block}."))
        ]
        together = torch.cat(unit)
        shares[name] = (together > owl.m * together.mean()).double().mean().item()
    return shares


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
@pytest.mark.parametrize("level", ["block", "layer"])
def test_sparsity_falls_linearly_with_the_share_of_outliers(name: str, level: str, tmp_path: Path) -> None:
    folder, text, owl = save(tmp_path / "m", name), tokens(4), OWL(level=level, m=2.0, lambda_=0.1)
    patterns, sizes = allocated(folder, owl, Unstructured(0.6), text)
    shares = naive_shares(folder, owl, text)
    total = sum(sizes.values())
    assert pruned(patterns, sizes) == round(0.6 * total)
    width = max(shares.values()) - min(shares.values())
    densities = {layer: 2 * 0.1 * share / width for layer, share in shares.items()}
    mean = sum(densities[layer] * size for layer, size in sizes.items()) / total
    for layer, pattern in patterns.items():
        assert pattern is not None
        assert 1 - pattern.sparsity == pytest.approx(0.4 + densities[layer] - mean, abs=2 / sizes[layer])


@pytest.mark.parametrize("sparsity", [0.02, 0.37, 0.95])
def test_the_total_is_exact_also_where_layers_meet_their_bounds(sparsity: float, tmp_path: Path) -> None:
    folder, owl = save(tmp_path / "m", "llama"), OWL(level="layer", m=2.0, lambda_=0.4)
    patterns, sizes = allocated(folder, owl, Unstructured(sparsity), tokens(4))
    assert pruned(patterns, sizes) == round(sparsity * sum(sizes.values()))
    found = [pattern.sparsity if pattern else 0.0 for pattern in patterns.values()]
    assert max(found) <= 1 - (1 - sparsity) / 10 + 1e-3
    assert (None in patterns.values()) == (sparsity == 0.02)


@pytest.mark.parametrize("level", ["block", "layer"])
@pytest.mark.parametrize("budget", ["4:8", "2:4", "1:2"])
def test_mixes_of_n_keep_exactly_what_the_budget_keeps(budget: str, level: str, tmp_path: Path) -> None:
    folder, text, owl = save(tmp_path / "m", "llama"), tokens(4), OWL(level=level, m=2.0, lambda_=0.2)
    whole = parse_pattern(budget)
    assert isinstance(whole, NM)
    patterns, sizes = allocated(folder, owl, whole, text)
    kept = {name: pattern.n if isinstance(pattern, NM) else whole.m for name, pattern in patterns.items()}
    assert all(pattern is None or isinstance(pattern, NM) for pattern in patterns.values())
    assert sum(n * sizes[name] for name, n in kept.items()) == whole.n * sum(sizes.values())
    if budget == "4:8":
        # Among layers of one size, more outliers never keep less.
        shares = naive_shares(folder, owl, text)
        assert len(set(kept.values())) > 1
        for a in sizes:
            for b in sizes:
                if level == "layer" and sizes[a] == sizes[b] and shares[a] > shares[b] + 1e-9:
                    assert kept[a] >= kept[b]


def test_without_text_weights_alone_are_scored(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", "llama")
    report = prune(folder, output=tmp_path / "out", method="magnitude", pattern="70%", allocation="owl:m=2")
    assert len({round(layer.sparsity, 2) for layer in report.layers}) == 3  # a sparsity for each block
    assert report.settings["allocation"] == {"name": "owl", "level": "block", "m": 2.0, "lambda_": 0.08}
    weights = sum(layer.weights for layer in report.layers)
    assert round(report.sparsity * weights) == round(0.7 * weights)


def test_equal_layers_share_alike(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", "llama")
    patterns, _ = allocated(folder, OWL(m=1e9), Unstructured(0.5), tokens())
    assert set(patterns.values()) == {Unstructured(0.5)}


def test_a_run_that_goes_on_does_not_survey_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = save(tmp_path / "m", "llama"), tokens(4)

    def run(output: str) -> Any:
        return prune(source, output=tmp_path / output, calibration=text, method="wanda", allocation="owl:m=2")

    whole = run("whole")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateurs.pruning.solvers.wanda.Wanda.solve", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    monkeypatch.setattr(OWL, "allocate", interrupt)
    again = run("out")
    assert [layer.pattern for layer in again.layers] == [layer.pattern for layer in whole.layers]
    assert run("out") == again


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"level": "head"}, "block or layer"), ({"m": 0}, "above 0"), ({"lambda_": 0.5}, "below 0.5")],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OWL(**settings)
