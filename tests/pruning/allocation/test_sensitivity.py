"""Measured sensitivity against a whole model in which one layer at a time is pruned by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import tokens
from folders import save, tensors_of
from secateurs import NM, Pattern, Sensitivity, Unstructured, parse_pattern, prune
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.pruning.allocation import sensitivity
from secateurs.pruning.allocation.sensitivity import interpolate
from secateurs.pruning.allocation.survey import Patterns, Survey, layer_shapes
from table import family_of, linear_weight


def allocated(folder: Path, budget: Pattern, text: Tensor) -> tuple[Patterns, dict[str, int]]:
    model = BlockwiseModel(Checkpoint(folder), torch.device("cpu"))
    seen: list[str] = []
    patterns = Sensitivity().allocate(Survey(model, text, 2, seen.append), budget)
    sizes = {name: out * width for name, (out, width) in layer_shapes(model).items()}
    assert seen == list(patterns) == list(sizes)
    return patterns, sizes


def block_outputs(model: PreTrainedModel, text: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    blocks = model.get_submodule(family_of(model.config).blocks)

    def note(block: Any, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(note) for block in blocks]  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model(text)
    for handle in handles:
        handle.remove()
    return outputs


def naive_errors(folder: Path, text: Tensor, patterns: list[Pattern]) -> dict[str, list[float]]:
    """Each layer pruned alone by Wanda's rule in float64; how far its block's output moves."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    family = family_of(model.config)
    dense = block_outputs(model, text)
    errors: dict[str, list[float]] = {}
    for index in range(len(dense)):
        for group in family.groups:
            inputs: list[Tensor] = []
            first = model.get_submodule(f"{family.blocks}.{index}.{group[0]}")
            handle = first.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0]))
            block_outputs(model, text)
            handle.remove()
            norms = inputs[0].reshape(-1, inputs[0].shape[-1]).square().mean(0).sqrt()
            for name in group:
                path = f"{family.blocks}.{index}.{name}"
                weight = linear_weight(model.get_submodule(path)).data
                whole = weight.clone()
                errors[path] = []
                for pattern in patterns:
                    weight.copy_(whole * pattern.keep(whole.abs() * norms, group="row"))
                    moved = block_outputs(model, text)[index] - dense[index]
                    share = moved.square().sum(-1) / dense[index].square().sum(-1)
                    errors[path].append(share.mean().item())
                weight.copy_(whole)
    return errors


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m"])
def test_errors_are_those_of_a_whole_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the layers get what the errors say: here all but one a share at which they were measured."""
    monkeypatch.setattr(sensitivity, "MEASURED", (0.3, 0.6))
    monkeypatch.setattr(sensitivity, "STEP", 10.0)  # no shares between 0 and the most
    folder, text = save(tmp_path / "m", name), tokens(4)
    seen: list[list[float]] = []

    def note(at: Any, shares: list[float], errors: list[float]) -> list[float]:
        assert shares == [0.3, 0.6, pytest.approx(0.95)]
        seen.append(errors)
        return interpolate(at, shares, errors)

    monkeypatch.setattr(sensitivity, "interpolate", note)
    patterns, sizes = allocated(folder, Unstructured(0.5), text)
    expected = naive_errors(folder, text, [Unstructured(0.3), Unstructured(0.6), Unstructured(0.95)])
    assert list(expected) == list(patterns)
    assert np.array(seen) == pytest.approx(np.array(list(expected.values())), rel=1e-3)
    # Between nothing and the most: the layers that cost least per weight, and one in part.
    price = {layer: errors[-1] / sizes[layer] for layer, errors in expected.items()}
    shares = [patterns[layer].sparsity if patterns[layer] else 0.0 for layer in sorted(price, key=price.get)]  # type: ignore[union-attr, arg-type]
    full = sum(share > 0.949 for share in shares)
    assert all(share == pytest.approx(0.95, abs=1e-3) for share in shares[:full])
    assert shares[full + 1 :] == [0.0] * (len(shares) - full - 1)


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.777, 0.97])
def test_the_total_is_exact(sparsity: float, tmp_path: Path) -> None:
    patterns, sizes = allocated(save(tmp_path / "m", "llama"), Unstructured(sparsity), tokens(4))
    pruned = sum(round(pattern.sparsity * sizes[name]) for name, pattern in patterns.items() if pattern)
    assert pruned == round(sparsity * sum(sizes.values()))
    assert len(set(patterns.values())) > 1
    assert all(pattern.sparsity <= 1 - (1 - sparsity) / 10 + 1e-3 for pattern in patterns.values() if pattern)


@pytest.mark.parametrize("budget", ["2:4", "4:8"])
def test_mixes_of_n(budget: str, tmp_path: Path) -> None:
    """The total as asked, and no exchange between two layers of one size lowers the naive error."""
    folder, text = save(tmp_path / "m", "llama"), tokens(4)
    whole = parse_pattern(budget)
    assert isinstance(whole, NM)
    patterns, sizes = allocated(folder, whole, text)
    n = {name: pattern.n if isinstance(pattern, NM) else whole.m for name, pattern in patterns.items()}
    assert sum(n[name] * sizes[name] for name in n) == whole.n * sum(sizes.values())
    levels = list(range(max(1, whole.n - 2), min(whole.m, whole.n + 2) + 1))
    errors = naive_errors(folder, text, [NM(k, whole.m) for k in levels if k < whole.m])
    cost = {
        name: {k: own[i] if k < whole.m else 0.0 for i, k in enumerate(levels)}
        for name, own in ((name, [*row, 0.0]) for name, row in errors.items())
    }
    for a in n:
        for b in n:
            if a != b and sizes[a] == sizes[b] and n[a] + 1 in levels and n[b] - 1 in levels:
                now = cost[a][n[a]] + cost[b][n[b]]
                assert cost[a][n[a] + 1] + cost[b][n[b] - 1] >= now * (1 - 1e-4)


def test_a_run(tmp_path: Path) -> None:
    """What is planned is what is pruned, and by the survey itself nothing is. A second run plans alike."""
    source = save(tmp_path / "m", "llama", torch.bfloat16)

    def run(output: str) -> Any:
        return prune(
            source,
            output=tmp_path / output,
            calibration=tokens(4),
            method="magnitude",
            pattern="70%",
            allocation="sensitivity:tokens=30",
        )

    report = run("a")
    assert report.settings["allocation"] == {"name": "sensitivity", "tokens": 30}
    before, after = tensors_of(source), tensors_of(tmp_path / "a")
    layers = {name: weight for name, weight in after.items() if "_proj" in name}
    zeros = sum(int((weight == 0).sum()) for weight in layers.values())
    assert zeros == round(0.7 * sum(weight.numel() for weight in layers.values()))
    assert all(torch.equal(weight, before[name] * (weight != 0)) for name, weight in after.items())
    assert [layer.pattern for layer in run("b").layers] == [layer.pattern for layer in report.layers]


def test_without_text_there_is_nothing_to_measure(tmp_path: Path) -> None:
    source = save(tmp_path / "m", "llama")
    with pytest.raises(ValueError, match="calibration text"):
        prune(source, output=tmp_path / "out", method="magnitude", allocation="sensitivity")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Sensitivity(tokens=0)


def test_interpolation_is_by_the_logarithm() -> None:
    found = interpolate([0.0, 0.1, 0.2, 0.4, 0.6], [0.2, 0.6], [0.01, 0.09])
    assert found == pytest.approx([0.0, 0.005, 0.01, 0.03, 0.09])
