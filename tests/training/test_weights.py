"""Trained weights go back under the names, dtypes and shapes that they came from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import families
import folders
from secateurs.checkpoint import Checkpoint
from secateurs.runtime.load import load_model
from secateurs.training.weights import StoredWeights


def trained(folder: Path, out: Path, *, only: str = "", most: int = 10**9) -> dict[str, Tensor]:
    """Load, add to the parameters with `only` in their names, write; the state that the model then has."""
    checkpoint = Checkpoint(folder)
    model = load_model(folder, "cpu", torch.float32)
    weights = StoredWeights(model, checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += 0.01
    weights.round()
    out.mkdir()
    weights.write(out, most=most)
    return model.state_dict()


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_every_family_goes_back(name: str, tmp_path: Path) -> None:
    model = folders.save(tmp_path / "model", name, torch.bfloat16)
    state = trained(model, tmp_path / "out", most=20_000)
    before, after = folders.tensors_of(model), folders.tensors_of(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    (tmp_path / "out" / "config.json").write_bytes((model / "config.json").read_bytes())
    again = load_model(tmp_path / "out", "cpu", torch.float32).state_dict()
    for key, tensor in state.items():
        assert torch.equal(again[key], tensor), key


def test_each_in_its_own_dtype_and_what_did_not_change_as_it_was(tmp_path: Path) -> None:
    model = folders.save(tmp_path / "model", "llama", torch.bfloat16)
    tensors = folders.tensors_of(model)
    norm, up = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[norm] = tensors[norm].float() + 1e-5  # more than bfloat16 holds
    tensors[up] = tensors[up].half()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)  # of older versions
    tensors["model.mask"] = torch.tensor([True, False])
    folders.rewrite(model, tensors)
    state = trained(model, tmp_path / "out", only="up_proj")
    after = folders.tensors_of(tmp_path / "out")
    assert after.keys() == tensors.keys()
    for name, tensor in after.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name]) == ("up_proj" not in name)
    assert torch.equal(after[up].float(), state[up])
    assert torch.equal(state[up], (tensors[up].float() + 0.01).half().float())


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    """As OpenAI's GPT-2 files have them, with masks that no version reads any more."""
    model = folders.save(tmp_path / "model", "gpt2")
    tensors = {name.removeprefix("transformer."): t for name, t in folders.tensors_of(model).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril()
    folders.rewrite(model, tensors)
    trained(model, tmp_path / "out", only="mlp")
    after = folders.tensors_of(tmp_path / "out")
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(after[name], tensor) == (".mlp." not in name)


@pytest.mark.parametrize("stored", [False, True])
def test_tied_weights_are_written_where_they_were(stored: bool, tmp_path: Path) -> None:
    model = folders.save(tmp_path / "model", "qwen2")
    tensors = folders.tensors_of(model)
    assert "lm_head.weight" not in tensors
    if stored:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        folders.rewrite(model, tensors)
    trained(model, tmp_path / "out")
    after = folders.tensors_of(tmp_path / "out")
    assert after.keys() == tensors.keys()
    if stored:
        assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["model.norm.weight", "model.unknown"])
def test_what_is_not_finite_is_found_before_training(name: str, tmp_path: Path) -> None:
    model = folders.save(tmp_path / "model", "llama")
    folders.rewrite(model, {**folders.tensors_of(model), name: torch.full((48,), torch.nan)})
    with pytest.raises(ValueError, match=rf"'{name}' in .* holds NaN or Inf"):
        StoredWeights(load_model(model, "cpu"), Checkpoint(model))


def test_values_beyond_the_stored_dtype(tmp_path: Path) -> None:
    folder = folders.save(tmp_path / "model", "llama", torch.float16)
    model = load_model(folder, "cpu", torch.float32)
    weights = StoredWeights(model, Checkpoint(folder))
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = 1e6
    with pytest.raises(FloatingPointError, match=r"'model.norm.weight' .* torch.float16 cannot hold"):
        weights.round()
