"""Names in the files against those of the model: put right, or refused before the work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, FalconConfig, MixtralConfig

import families
import folders
from secateurs.checkpoint import INDEX, Checkpoint
from secateurs.checkpoint.names import skeleton_of
from secateurs.evaluation import load_model
from secateurs.evaluation.inspect import inspect
from secateurs.pruning.walk import prune
from secateurs.runtime import compress

MOST = "model.layers.1.mlp.up_proj.weight"

WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: "_orig_mod." + name,
    "regional compilation": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "DDP": lambda name: "module." + name,
    "DDP of a compiled model": lambda name: "module._orig_mod." + name,
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(".mlp.", ".mlp._fsdp_wrapped_module."),
    "activation checkpointing": lambda name: name.replace(
        "layers.0.", "layers.0._checkpoint_wrapped_module."
    ),
    "PEFT": lambda name: "base_model.model." + name.replace("_proj.", "_proj.base_layer."),
    "a value head": lambda name: "pretrained_model." + name,
    "a vision model": lambda name: "language_model." + name,
    "a vision model's body": lambda name: name.replace("model.", "language_model.model."),
    "twice": lambda name: "model." + name,
    "any": lambda name: "my.net." + name,
    "the bare model": lambda name: name.removeprefix("model."),
}


def renamed(folder: Path, source: Path, name: Callable[[str], str]) -> Path:
    shutil.copytree(source, folder)
    folders.rewrite(folder, {name(key): tensor for key, tensor in folders.tensors_of(source).items()})
    return folder


def refused(folder: Path, message: str, tmp_path: Path) -> None:
    """By every verb, in one line, with nothing written."""
    line = rf"\A[^\n]*{message}[^\n]*\Z"
    for verb in (
        lambda: prune(folder, output=tmp_path / "out", method="magnitude"),
        lambda: compress(folder, tmp_path / "out"),
        lambda: load_model(folder, "cpu"),
        lambda: inspect(folder),
    ):
        before = folders.everything_in(tmp_path)
        with pytest.raises(ValueError, match=line):
            verb()
        assert folders.everything_in(tmp_path) == before


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.save(tmp_path_factory.mktemp("names") / "plain", "llama")


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_a_wrapper_left_is_taken_off(wrapper: str, plain: Path, tmp_path: Path) -> None:
    folder = renamed(tmp_path / "wrapped", plain, WRAPPED[wrapper])
    ids = families.tokens()
    expected = AutoModelForCausalLM.from_pretrained(plain)(ids).logits
    assert torch.equal(load_model(folder, "cpu")(ids).logits, expected)
    assert [layer.name for layer in inspect(folder).layers] == [layer.name for layer in inspect(plain).layers]

    prune(folder, output=tmp_path / "pruned", method="magnitude", pattern="70%")
    prune(plain, output=tmp_path / "right", method="magnitude", pattern="70%")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "right")
    assert torch.equal(model(ids).logits, right(ids).logits)


def test_a_wrapped_model_is_compressed_by_its_own_names(plain: Path, tmp_path: Path) -> None:
    prune(plain, output=tmp_path / "pruned", method="magnitude", pattern="70%")
    tensors = folders.tensors_of(tmp_path / "pruned")
    shutil.copytree(plain, tmp_path / "wrapped")
    folders.rewrite(tmp_path / "wrapped", {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    done = compress(tmp_path / "wrapped", tmp_path / "small")
    assert done.layers == 21
    ids = families.tokens()
    dense, small = (load_model(tmp_path / name, "cpu") for name in ("pruned", "small"))
    assert torch.allclose(small(ids).logits, dense(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("dropped", "family"),
    [
        ("lm_head.weight", "llama"),
        ("model.norm.weight", "llama"),
        (MOST, "llama"),
        ("model.embed_tokens.weight", "qwen2"),  # tied: both are gone
        ("transformer.h.0.attn.c_attn.bias", "gpt2"),
    ],
)
def test_what_is_missing_is_refused_by_all(dropped: str, family: str, tmp_path: Path) -> None:
    folder = folders.save(tmp_path / "model", family)
    tensors = folders.tensors_of(folder)
    del tensors[dropped]
    folders.rewrite(folder, tensors)
    refused(folder, f"holds no tensor '{dropped}'", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            lambda name: "base_model.model." + name.replace("k_proj.w", "k_proj.lora_A.default.w"),
            "not merged",
        ),
        (lambda name: "foo." + name.replace("up_proj", "fc1"), "up_proj.weight', nor behind 'foo.'"),
        (lambda name: "x." + name.replace(".", "_"), r"its names are other ones \('x.lm_head_weight'\)"),
        (lambda name: name.replace("lm_head", "head"), "holds no tensor 'lm_head.weight'"),
    ],
)
def test_names_without_a_plain_meaning(
    name: Callable[[str], str], message: str, plain: Path, tmp_path: Path
) -> None:
    refused(renamed(tmp_path / "model", plain, name), message, tmp_path)


def test_two_models_in_one_folder(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    shutil.copytree(plain, folder)
    tensors = folders.tensors_of(plain)
    folders.rewrite(
        folder, {f"{who}.{name}": t.clone() for who in ("actor", "critic") for name, t in tensors.items()}
    )
    refused(folder, "behind 'actor.' and 'critic.': save one model", tmp_path)


def test_a_tied_embedding_may_be_stored_by_the_heads_name(tmp_path: Path) -> None:
    folder = folders.save(tmp_path / "model", "qwen2")
    expected = AutoModelForCausalLM.from_pretrained(folder)(families.tokens()).logits
    tensors = folders.tensors_of(folder)
    folders.rewrite(folder, {name.replace("model.embed_tokens", "lm_head"): t for name, t in tensors.items()})
    assert torch.equal(load_model(folder, "cpu")(families.tokens()).logits, expected)
    ids = families.tokens()
    prune(folder, output=tmp_path / "out", method="wanda", calibration=ids, pattern="1%")
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1][
        "missing_keys"
    ]


MANY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**MANY, intermediate_size=48, num_key_value_heads=2, num_local_experts=3),
        FalconConfig(**MANY),
        DeepseekV3Config(
            **MANY,
            intermediate_size=48,
            num_key_value_heads=4,
            n_routed_experts=4,
            moe_intermediate_size=16,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
    ],
    ids=lambda config: str(config.model_type),
)
def test_any_family_is_held_against_its_model(config: object, tmp_path: Path) -> None:
    """Also where the model's parameters are others than the files': every single tensor is needed."""
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert not skeleton_of(Checkpoint(tmp_path)).training
    tensors = folders.tensors_of(tmp_path)
    for name in tensors:
        folders.rewrite(tmp_path, {key: tensor for key, tensor in tensors.items() if key != name})
        with pytest.raises(ValueError, match=r"holds no tensor|has shape|does not hold what"):
            skeleton_of(Checkpoint(tmp_path))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layout_of_shards_is_read_as_transformers_reads_it(
    data: st.DataObject, plain: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = folders.tensors_of(plain)
    shutil.copy(plain / "config.json", folder)
    files = ["a.safetensors", "model-00001-of-00002.safetensors", "z9.safetensors"]
    home = {name: data.draw(st.sampled_from(files), label=name) for name in tensors}
    unlisted = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=3), label="unlisted")
    lost = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=1), label="lost")
    for file in set(home.values()):
        save_file({n: t for n, t in tensors.items() if home[n] == file and n not in lost}, folder / file)
    listed = {name: file for name, file in home.items() if name not in unlisted | lost}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    try:
        checkpoint = Checkpoint(folder)
        skeleton_of(checkpoint)
        refused = False
    except ValueError:
        refused = True
    assert refused == bool(report["missing_keys"])
    if refused:
        return
    state = model.state_dict()
    for name, tensor in checkpoint.load(checkpoint.file_of).items():
        assert torch.equal(tensor, state[name])
