"""Activity of heads and channels: against arithmetic done in another way, and on neurons made silent."""

import json
from pathlib import Path

import pytest
import torch
from test_omission import READERS
from torch import Tensor

import families
import folders
from secateurs.training.profile import BlockProfile, measure_activity, profile


def inputs_of(model: torch.nn.Module, layers: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """What layers are given, (tokens, in)."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].flatten(0, -2).double()})
        )
        for name in layers
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_measures_are_what_they_say(name: str) -> None:
    model, tokens = families.build(name), families.tokens()
    blocks, names = READERS.get(model.config.model_type, READERS["llama"])
    layers = {
        kind: [f"{blocks}.{index}.{layer}" for index in range(3)]
        for kind, layer in zip(("heads", "channels"), names, strict=True)
    }
    seen = inputs_of(model, [*layers["heads"], *layers["channels"]], tokens)
    for index, block in enumerate(measure_activity(model, tokens)):
        outputs = seen[layers["heads"][index]].unflatten(1, (6, -1))
        for activity, strength in (
            (block.heads, outputs.square().sum(2).sqrt()),
            (block.channels, seen[layers["channels"][index]].abs()),
        ):
            small = torch.stack([row < 0.1 * row.max() for row in strength])
            assert activity.barely_active == pytest.approx(small.double().mean().item(), abs=1e-3)
            means = strength.mean(0)
            assert activity.means == pytest.approx((means / means.mean()).tolist(), rel=1e-4, abs=1e-6)
            assert activity.quiet == (means < 0.5 * means.mean()).double().mean().item()
            energy = sorted((strength**2).sum(0).tolist(), reverse=True)
            expected = sum(energy[: len(energy) // 2]) / sum(energy)
            assert activity.half_keeps == pytest.approx(expected, rel=1e-4)


def test_silent_neurons_are_found() -> None:
    """Half of the channels and of the heads write nothing: they are barely active, the others keep all."""
    model = families.build("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[::2] = 0
            block.self_attn.v_proj.weight[:8] = 0  # of the first three query heads
    for block in measure_activity(model, families.tokens()):
        for activity in (block.heads, block.channels):
            assert activity.half_keeps == pytest.approx(1.0)
            assert activity.quiet >= 0.5
            assert activity.barely_active >= 0.5
            assert sorted(activity.means)[: len(activity.means) // 2] == [0.0] * (len(activity.means) // 2)


def test_the_order_and_the_batches_of_windows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = families.build("opt"), families.tokens(batch=6)
    whole = measure_activity(model, tokens)
    monkeypatch.setattr("secateurs.training.profile.TOKENS_AT_ONCE", 50)
    for one, other in zip(whole, measure_activity(model, tokens.flip(0)), strict=True):
        assert one.channels.means == pytest.approx(other.channels.means, rel=1e-5)
        assert one.heads.barely_active == pytest.approx(other.heads.barely_active, abs=1e-2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folders.save(tmp_path / "model", "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("It was a cold evening, and nobody had lit a fire. " * 5)
    return file


def test_figures_and_picture(model: Path, text: Path, tmp_path: Path) -> None:
    before = folders.bytes_of(model)
    blocks = profile(model, text=text, output=tmp_path / "out", length=50, samples=3, device="cpu")
    assert len(blocks) == 3
    assert all(isinstance(block, BlockProfile) for block in blocks)
    content = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert content["settings"] == {"model": str(model), "text": str(text), "windows": 3, "length": 50}
    assert content["blocks"][2]["heads"]["half_keeps"] == blocks[2].heads.half_keeps
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "profile.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]
    assert folders.bytes_of(model) == before


def test_activations_that_are_not_finite(model: Path, text: Path, tmp_path: Path) -> None:
    weights = folders.tensors_of(model)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e38
    folders.rewrite(model, weights)
    with pytest.raises(FloatingPointError, match=r"'model.layers.1' hold NaN or Inf"):
        profile(model, text=text, output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("place", ["out", "out.partial"])
def test_what_others_left_stays(model: Path, text: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / "weights").write_text("of an unfinished run")
    with pytest.raises(ValueError, match="give another output folder"):
        profile(model, text=text, output=tmp_path / "out", device="cpu")
    assert (tmp_path / place / "weights").read_text() == "of an unfinished run"


def test_output_in_the_model(model: Path, text: Path) -> None:
    before = folders.bytes_of(model)
    with pytest.raises(ValueError, match="the model's own folder"):
        profile(model, text=text, output=model / "profile", device="cpu")
    assert folders.bytes_of(model) == before
