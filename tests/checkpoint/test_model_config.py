"""Configurations as people have them: read the same way by every verb, or refused in one short line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import families
import folders
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import read_config
from secateurs.evaluation import load_model
from secateurs.evaluation.inspect import inspect
from secateurs.pruning.walk import prune
from secateurs.runtime import compress, decompress


def edit(folder: Path, *without: str, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in without}
    (folder / "config.json").write_text(json.dumps(kept | fields))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folders.save(tmp_path / "model", "llama")


@pytest.mark.parametrize(
    "implementation", ["flash_attention_2", "flash_attention_3", "flex_attention", "mine"]
)
@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
def test_an_attention_that_is_not_installed(field: str, implementation: str, model: Path) -> None:
    ids = families.tokens()
    expected = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    edit(model, **{field: implementation})
    before = (model / "config.json").read_bytes()
    loaded = load_model(model, "cpu")
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    prune(model, output=model.parent / "out", method="wanda", calibration=ids, pattern="70%")
    assert (model.parent / "out" / "config.json").read_bytes() == before
    inspect(model.parent / "out")
    compress(model.parent / "out", model.parent / "small")
    load_model(model.parent / "small", "cpu")


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_an_attention_that_is_there_is_kept(asked: str, model: Path) -> None:
    assert load_model(edit(model, attn_implementation=asked), "cpu").config._attn_implementation == asked


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "not_yet"}, r"\(not_yet\): version [\d.]+ does not know it"),
        ({"model_type": "t5"}, r"does not describe a causal language model \(t5\)"),
        ({"model_type": None}, "has to name the model_type"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}, "code of its own, which is not run"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_act": "none of these"}, "none of these"),
        ({"num_hidden_layers": 4}, "holds no tensor 'model.layers.3"),
        ({"dtype": "floaty"}, "floaty"),
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, Any], message: str, model: Path) -> None:
    edit(model, **fields)
    for read in (lambda: load_model(model, "cpu"), lambda: compress(model, model.parent / "out")):
        with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z") as caught:
            read()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ("quantization_config", {"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq, 4 bits"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ("quantization_config", {"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ("quantization_config", {"quant_method": "none of these"}, "none of these"),
        (
            "quantization_config",
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors, sparse-24-bitmask",
        ),
        ("compression_config", {"format": "pack-quantized"}, "pack-quantized"),
        ("quantization", {"group_size": 64, "bits": 4}, "4 bits"),
        ("text_config", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_quantised_folders_are_named_by_every_verb(
    field: str, value: dict[str, Any], said: str, model: Path
) -> None:
    edit(model, **{field: value})
    out = model.parent / "out"
    for verb in (
        lambda: prune(model, output=out, method="magnitude"),
        lambda: compress(model, out),
        lambda: load_model(model, "cpu"),
        lambda: inspect(model),
    ):
        with pytest.raises(ValueError, match=rf"\A[^\n]*holds quantised weights \({said}\)[^\n]*\Z"):
            verb()
    assert not out.exists()


def test_quantised_weights_are_told_by_their_names(model: Path) -> None:
    tensors = folders.tensors_of(model)
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(2, 2, dtype=torch.int32)
    folders.rewrite(model, tensors)
    with pytest.raises(ValueError, match=r"quantised weights \('model.layers.0.mlp.up_proj.qweight'\)"):
        load_model(model, "cpu")


def test_a_compressed_model_is_decompressed_before_it_is_pruned(model: Path, tmp_path: Path) -> None:
    prune(model, output=tmp_path / "pruned", method="magnitude", pattern="70%")
    compress(tmp_path / "pruned", tmp_path / "small")
    with pytest.raises(ValueError, match="is compressed: secateurs decompress"):
        prune(tmp_path / "small", output=tmp_path / "out", method="magnitude")
    decompress(tmp_path / "small", tmp_path / "dense")
    prune(tmp_path / "dense", output=tmp_path / "out", method="magnitude", pattern="80%")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("said", ["float32", "bfloat16", "float16", None])
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_dtype_in_the_config_that_is_not_the_files(
    field: str, said: str | None, stored: torch.dtype, tmp_path: Path
) -> None:
    folder = folders.save(tmp_path / "model", "llama", stored)
    tensors = folders.tensors_of(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    folders.rewrite(folder, tensors)
    edit(folder, "dtype", **({field: said} if said else {}))
    computed = getattr(torch, said) if said else stored
    assert BlockwiseModel(Checkpoint(folder), torch.device("cpu")).dtype == computed
    if said:
        assert read_config(Checkpoint(folder)).dtype == computed
        assert load_model(folder, "cpu").dtype == computed
    ids = families.tokens()
    prune(folder, output=tmp_path / "out", method="wanda", calibration=ids, pattern="50%")
    after = {
        name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()
    }
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in tensors.items()}


def test_adapters_beside_merged_weights_are_left_aside(model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = families.tokens()
    expected = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    other = peft.get_peft_model(families.build("llama", seed=1), peft.LoraConfig(target_modules=["q_proj"]))
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(0.3)
    other.save_pretrained(model)
    assert (model / "adapter_model.safetensors").exists()
    with pytest.warns(UserWarning, match="also holds adapters, which are left aside"):
        loaded = load_model(model, "cpu")
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.generation_config.max_new_tokens == 7
    with pytest.warns(UserWarning, match="left aside"):
        prune(model, output=tmp_path / "out", method="magnitude", pattern="1:2")
    assert not list((tmp_path / "out").glob("adapter*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
