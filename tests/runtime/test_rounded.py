"""Rounded models as folders: pruned with values, compressed, loaded, saved and made dense again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import CONFIGS
from transformers import AutoModelForCausalLM

import decoders
import folders
import secateurs
from secateurs.checkpoint.scales import read_scales, write_scales
from secateurs.runtime.linear import SparseLinear

NAMES = ["llama", "gpt2", "phi3", "opt"]


def made(name: str, folder: Path, **settings: Any) -> Path:
    """A small model, pruned by magnitude and rounded."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).save_pretrained(folder / "dense")
    secateurs.prune(folder / "dense", output=folder / "rounded", method="magnitude", device="cpu", **settings)
    return folder / "rounded"


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.float()
    return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("pattern", "values"), [("50%", "int4"), ("0%", "int3:group=32"), ("70%", "int2")])
def test_a_rounded_model_is_packed_to_the_bit(name: str, pattern: str, values: str, tmp_path: Path) -> None:
    rounded, small, again = (
        made(name, tmp_path, pattern=pattern, values=values),
        tmp_path / "s",
        tmp_path / "d",
    )
    done = secateurs.compress(rounded, small)
    assert done.coded == done.layers > 0
    assert not done.moved
    secateurs.decompress(small, again)
    was, is_ = folders.tensors_of(rounded), folders.tensors_of(again)
    assert was.keys() == is_.keys()
    assert all(torch.equal(was[key].view(torch.int16), is_[key].view(torch.int16)) for key in was)
    before, after = read_scales(rounded), read_scales(again)
    assert before.keys() == after.keys()
    for parameter, (grid, scales) in before.items():
        assert grid == after[parameter][0]
        assert torch.equal(scales, after[parameter][1])
    wanted, given = logits(rounded), logits(small)
    assert (given - wanted).norm() < 0.03 * wanted.norm()


def test_what_transformers_saves_is_the_same(tmp_path: Path) -> None:
    secateurs.compress(made("llama", tmp_path, pattern="50%", values="int4"), tmp_path / "s")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert sum(isinstance(module, SparseLinear) for module in loaded.modules()) == 14
    loaded.save_pretrained(tmp_path / "saved")
    first, second = (folders.tensors_of(tmp_path / each) for each in ("s", "saved"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(tmp_path / "s"), logits(tmp_path / "saved"))


def test_what_was_changed_since_is_packed_as_it_is(tmp_path: Path) -> None:
    rounded = made("llama", tmp_path, pattern="50%", values="int4")
    tensors = folders.tensors_of(rounded)
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key] * 1.01
    save_file(tensors, rounded / "model.safetensors", metadata={"format": "pt"})
    done = secateurs.compress(rounded, tmp_path / "s")
    assert (done.moved, done.coded, done.layers) == (1, 13, 14)
    assert "1 are off the grid" in str(done)
    secateurs.decompress(tmp_path / "s", tmp_path / "d")
    assert torch.equal(folders.tensors_of(tmp_path / "d")[key], tensors[key])


def test_experts_are_packed_one_by_one(tmp_path: Path) -> None:
    folder = decoders.save("qwen3_moe", tmp_path / "model")
    secateurs.prune(
        folder,
        output=tmp_path / "rounded",
        method="sparsegpt",
        pattern="50%",
        values="int4:group=32",
        calibration=decoders.tokens(6, 24),
        device="cpu",
    )
    done = secateurs.compress(tmp_path / "rounded", tmp_path / "s")
    assert done.experts
    assert done.coded == done.layers
    secateurs.decompress(tmp_path / "s", tmp_path / "d")
    before, after = (folders.tensors_of(tmp_path / each) for each in ("rounded", "d"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    wanted, given = logits(tmp_path / "rounded"), logits(tmp_path / "s")
    assert (given - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("spoilt", ["truncated", "other shape"])
def test_scales_that_do_not_fit(spoilt: str, tmp_path: Path) -> None:
    rounded = made("llama", tmp_path, pattern="50%", values="int4")
    path = rounded / "quantised" / "scales.safetensors"
    if spoilt == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(ValueError, match=r"\A[^\n]*scales.safetensors' is truncated[^\n]*\Z"):
            secateurs.compress(rounded, tmp_path / "s")
        assert not (tmp_path / "s").exists()
        return
    write_scales(rounded, {name: (grid, s[:, :1]) for name, (grid, s) in read_scales(rounded).items()})
    done = secateurs.compress(rounded, tmp_path / "s")
    assert done.moved


def test_scales_of_what_is_not_in_the_model(tmp_path: Path) -> None:
    rounded = made("llama", tmp_path, pattern="50%", values="int4")
    write_scales(rounded, {f"x.{name}": grid for name, grid in read_scales(rounded).items()})
    with pytest.raises(ValueError, match=r"\A[^\n]*has scales of 'x[^\n]*not in the model[^\n]*\Z"):
        secateurs.compress(rounded, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_scales_that_got_lost_are_missed(tmp_path: Path) -> None:
    rounded = made("llama", tmp_path, pattern="50%", values="int4")
    shutil.rmtree(rounded / "quantised")
    with pytest.warns(UserWarning, match="was rounded to few bits, but has no quantised/scales"):
        done = secateurs.compress(rounded, tmp_path / "s")
    assert done.layers == 14
    assert not done.coded


def test_one_expert_that_is_not_rounded_is_nobodys_change(tmp_path: Path) -> None:
    folder = decoders.save("qwen3_moe", tmp_path / "model")
    secateurs.prune(
        folder,
        output=tmp_path / "rounded",
        method="magnitude",
        values="int4:group=32",
        allocation={"*.experts.0.*": "50%", "*.experts.2.*": "50%", "*.self_attn.*": "50%"},
        device="cpu",
    )
    done = secateurs.compress(tmp_path / "rounded", tmp_path / "s")
    assert done.coded
    assert not done.moved
    secateurs.decompress(tmp_path / "s", tmp_path / "d")
    before, after = (folders.tensors_of(tmp_path / each) for each in ("rounded", "d"))
    assert all(torch.equal(before[key], after[key]) for key in before)
