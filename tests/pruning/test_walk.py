"""The walk against whole models in memory; what it writes, refuses and records; runs that are cut short."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import secateurs.checkpoint
import secateurs.pruning.block.joint
import secateurs.pruning.folder
from families import FAMILIES, tokens
from folders import bytes_of, everything_in, rewrite, save, tensors_of
from secateurs import (
    ADMM,
    Report,
    Solution,
    Solver,
    SparseGPT,
    SparseLLM,
    Statistics,
    Wanda,
    parse_pattern,
    prune,
)
from secateurs.pattern import Pattern
from secateurs.pruning.block.local import Sequential
from secateurs.pruning.block.refine import Refined
from table import family_of, linear_weight

LLAMA_LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
LLAMA_LAYERS = [f"model.layers.{index}.{name}" for index in range(3) for name in LLAMA_LINEARS]


# The same in memory, with nothing of the walk's: hooks on a whole model.


def inputs_of(model: PreTrainedModel, layers: list[nn.Module], batches: list[Tensor]) -> list[list[Tensor]]:
    """What each of the layers receives, batch by batch, when the whole model reads the text."""
    inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: inputs[layer].append(args[0])) for layer in layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return list(inputs.values())


def stages_of(model: PreTrainedModel, block: nn.Module, sequential: Sequential) -> list[list[nn.Module]]:
    """The block's linears, apart where one is to see the other pruned."""
    linears = {
        module: name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    if sequential == "block":
        return [list(linears)]
    if sequential == "sublayer":
        attention = [layer for layer, name in linears.items() if "attn" in name or "attention" in name]
        return [attention, [layer for layer in linears if layer not in attention]]
    order: list[tuple[nn.Module, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: order.append((layer, args[0])))
        for layer in linears
    ]
    with torch.no_grad():
        model(tokens(1), use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(order) == len(linears)
    return [[layer for layer, _ in group] for _, group in itertools.groupby(order, lambda pair: id(pair[1]))]


def prune_in_memory(
    folder: Path,
    batches: list[Tensor],
    solver: Solver,
    pattern: Pattern,
    sequential: Sequential,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The pruned model's weights by name; the solver works in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for block in model.get_submodule(family_of(model.config).blocks).children():
        for stage in stages_of(model, block, sequential):
            for layer, inputs in zip(stage, inputs_of(model, stage, batches), strict=True):
                weight = linear_weight(layer)
                rows = torch.cat([x.flatten(0, -2) for x in inputs]).to(dtype)
                solution = solver.solve(weight.to(dtype), Statistics.from_inputs(rows), pattern)
                with torch.no_grad():
                    weight.copy_(solution.weight)
    return model.state_dict()


def linear_names(folder: Path) -> list[str]:
    """Names of the weights of all linears in the blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    path = family_of(model.config).blocks
    blocks = model.get_submodule(path)
    return [
        f"{path}.{name}.weight"
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


def assert_loads(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def assert_only_linears_changed(source: Path, output: Path, linears: list[str]) -> None:
    before, after = tensors_of(source), tensors_of(output)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert tensor.shape == before[name].shape
        if name not in linears:
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    for name in linears:
        assert not torch.equal(after[name], before[name]), name
        zeros = after[name][after[name] == 0]
        assert len(zeros)
        assert not zeros.signbit().any(), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in FAMILIES),
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("gpt2", torch.bfloat16),
    ],
)
def test_wanda_is_that_of_a_whole_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Its weights do not change, so that a single wrong input would show as a wrong mask: float64 decides."""
    source = save(tmp_path / "source", name, dtype)
    before = bytes_of(source)
    text = tokens(3)
    pattern = parse_pattern("60%")
    expected = prune_in_memory(source, list(text.split(1)), Wanda(), pattern, "block", torch.float64)
    report = prune(
        source, output=tmp_path / "out", calibration=text, method="wanda", pattern="60%", batch_size=1
    )
    pruned = tensors_of(tmp_path / "out")
    linears = linear_names(source)
    assert sorted(layer.name + ".weight" for layer in report.layers) == sorted(linears)
    for linear in linears:
        assert torch.equal(pruned[linear], expected[linear]), linear
    assert_only_linears_changed(source, tmp_path / "out", linears)
    loaded = assert_loads(tmp_path / "out")
    assert loaded.dtype == dtype
    for linear in linears:
        assert torch.equal(loaded.get_parameter(linear), pruned[linear])
    assert bytes_of(source) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_sparsegpt_is_that_of_a_whole_model(name: str, tmp_path: Path) -> None:
    """Every weight changes, and with it what later blocks see."""
    source = save(tmp_path / "source", name)
    text = tokens(6)
    solver, pattern = SparseGPT(block=32), parse_pattern("2:4")
    expected = prune_in_memory(source, [text], solver, pattern, "block", torch.float32)
    prune(source, output=tmp_path / "out", calibration=text, method=solver, pattern="2:4", sequential="block")
    pruned = tensors_of(tmp_path / "out")
    for linear in linear_names(source):
        assert torch.equal(pruned[linear] == 0, expected[linear] == 0), linear
        torch.testing.assert_close(pruned[linear], expected[linear])


@pytest.mark.parametrize("sequential", ["block", "sublayer", "linear"])
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_neox-sequential", "opt-350m", "phi3"])
def test_what_a_layer_has_seen_when_it_is_measured(name: str, sequential: Sequential, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name)
    text = tokens(6)
    solver, pattern = SparseGPT(), parse_pattern("70%")
    prune(
        source, output=tmp_path / "out", calibration=text, method=solver, pattern="70%", sequential=sequential
    )
    pruned = tensors_of(tmp_path / "out")
    linears = linear_names(source)
    choices: tuple[Sequential, ...] = ("block", "sublayer", "linear")
    same = {
        choice: all(
            torch.allclose(pruned[linear], expected[linear], rtol=1e-4, atol=1e-5) for linear in linears
        )
        for choice in choices
        for expected in [prune_in_memory(source, [text], solver, pattern, choice, torch.float32)]
    }
    assert same == {choice: choice == sequential for choice in choices}


def test_how_the_text_is_batched_does_not_matter(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "mistral")
    results = []
    for batch_size in (1, 2, 5):
        output = tmp_path / str(batch_size)
        prune(
            source, output=output, calibration=tokens(5), method="wanda", pattern="50%", batch_size=batch_size
        )
        results.append(tensors_of(output))
    for result in results[1:]:
        assert all(torch.equal(result[name], tensor) for name, tensor in results[0].items())


# What is written.


def test_shards_and_one_file_give_the_same(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", "llama", torch.bfloat16)
    shards = save(tmp_path / "shards", "llama", torch.bfloat16, shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 4
    for source in (whole, shards):
        size = "30KB" if source == shards else "5GB"
        prune(
            source,
            output=source.with_suffix(".out"),
            calibration=tokens(),
            method="wanda",
            batch_size=1,
            max_shard_size=size,
        )
    expected = tensors_of(whole.with_suffix(".out"))
    result = tensors_of(shards.with_suffix(".out"))
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    index = json.loads((shards.with_suffix(".out") / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == result.keys()
    files = [path.stat().st_size for path in shards.with_suffix(".out").glob("*.safetensors")]
    assert len(files) > 3
    assert max(files) < 30_000 + 8_000  # and a header
    assert_loads(shards.with_suffix(".out"))


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama", "model.")]
)
def test_names_without_the_base_models_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name)
    bare = shutil.copytree(source, tmp_path / "bare")
    rewrite(bare, {key.removeprefix(prefix): tensor for key, tensor in tensors_of(source).items()})
    for folder in (source, bare):
        prune(folder, output=folder.with_suffix(".out"), calibration=tokens(), pattern="2:4")
    expected = tensors_of(source.with_suffix(".out"))
    result = tensors_of(bare.with_suffix(".out"))
    assert result.keys() == tensors_of(bare).keys()
    assert any(not key.startswith(prefix) for key in result)
    assert all(torch.equal(result[key.removeprefix(prefix)], tensor) for key, tensor in expected.items())
    loaded = AutoModelForCausalLM.from_pretrained(bare.with_suffix(".out"))
    same = AutoModelForCausalLM.from_pretrained(source.with_suffix(".out"))
    assert torch.equal(loaded(tokens()).logits, same(tokens()).logits)


def test_tensors_that_the_models_code_does_not_read_survive(tmp_path: Path) -> None:
    """Old GPT-2 files hold masks in their blocks, and the configs beside them no dtype."""
    source = save(tmp_path / "source", "gpt2", torch.bfloat16)
    extra = {
        f"transformer.h.{index}.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
        for index in range(3)
    }
    extra["elsewhere"] = torch.arange(3)
    rewrite(source, {**tensors_of(source), **extra})
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    prune(source, output=tmp_path / "out", calibration=tokens(), method="wanda")
    result = tensors_of(tmp_path / "out")
    assert all(torch.equal(result[name], tensor) for name, tensor in extra.items())
    assert_only_linears_changed(source, tmp_path / "out", linear_names(source))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "qwen2")
    prune(source, output=tmp_path / "out", calibration=tokens())
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    model = assert_loads(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_folder_is_a_model_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    (source / "LICENSE").write_text("ours")
    (source / "pytorch_model.bin").write_bytes(b"not copied")
    output = tmp_path / "deep" / "er" / "out"
    prune(source, output=output, calibration=tokens())
    companions = {path.name for path in source.iterdir() if path.suffix == ".json"} | {"LICENSE"}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"} < companions
    assert {path.name for path in output.iterdir()} == {
        *companions,
        "README.md",
        "model.safetensors",
        "secateurs.json",
    }
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    for name in companions:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    model = assert_loads(output)
    assert model.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(output)("a b")["input_ids"] == [ord(letter) for letter in "a b"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_record(name: str, tmp_path: Path) -> None:
    """Errors and sparsities against the weights and a whole model's activations."""
    source = save(tmp_path / "source", name)
    text = tokens(4)
    report = prune(
        source,
        output=tmp_path / "out",
        calibration=text,
        method="admm:iterations=6,polish=3",
        pattern="70%",
        sequential="block",
    )
    record = json.loads((tmp_path / "out" / "secateurs.json").read_text())
    assert record["settings"]["method"] == {"name": "admm", "iterations": 6, "polish": 3, "ridge": 0.01}
    assert (record["settings"]["pattern"], record["settings"]["allocation"]) == ("70%", "uniform")
    assert record["settings"]["sequential"] == "block"
    assert record["settings"]["device"] == "cpu"
    calibration = record["settings"]["calibration"]
    assert (calibration["source"], calibration["samples"], calibration["length"]) == ("token ids", 4, 24)
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"] == transformers.__version__
    assert record["versions"].keys() >= {"secateurs"}
    assert record["seconds"] >= sum(layer["seconds"] for layer in record["layers"])
    assert record["phases"].keys() == {"load", "run", "solve", "refine", "write"}
    assert Report.read(tmp_path / "out") == report

    dense, sparse = AutoModelForCausalLM.from_pretrained(source), assert_loads(tmp_path / "out")
    path = family_of(dense.config).blocks
    zeros = weights = 0
    for index, block in enumerate(dense.get_submodule(path).children()):
        layers = [layer for layer in report.layers if layer.name.startswith(f"{path}.{index}.")]
        modules = [dense.get_submodule(layer.name) for layer in layers]
        for layer, module, [x] in zip(layers, modules, inputs_of(dense, modules, [text]), strict=True):
            before = linear_weight(module).detach().double()
            after = linear_weight(sparse.get_submodule(layer.name)).detach().double()
            x = x.double()
            lost, energy = (x @ (before - after).T).square().sum(), (x @ before.T).square().sum()
            assert layer.error == pytest.approx(float(lost / energy), rel=1e-4)
            assert layer.error > 0.001
            assert layer.weights == after.numel()
            assert layer.pattern == "70%"
            assert round(layer.sparsity * layer.weights) == round(0.7 * layer.weights)
            assert int((after == 0).sum()) == round(0.7 * layer.weights)
            assert layer.seconds > 0
            assert len(layer.objective) == 4
            assert layer.objective[-1] == pytest.approx(layer.error, rel=1e-3)
            zeros, weights = zeros + int((after == 0).sum()), weights + after.numel()
        block.load_state_dict(sparse.get_submodule(f"{path}.{index}").state_dict())
    assert report.sparsity == pytest.approx(zeros / weights, rel=1e-12)
    assert report.error == pytest.approx(sum(layer.error for layer in report.layers) / len(report.layers))


def test_every_layer_gets_the_pattern_of_its_own(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    table = {"*.layers.1.*": None, "*.q_proj": "2:4", "*.k_proj": "30%", "*.mlp.*": "5:8"}
    report = prune(source, output=tmp_path / "out", calibration=tokens(), method="wanda", allocation=table)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    expected = {"q_proj": "2:4", "k_proj": "30%", "gate_proj": "5:8", "up_proj": "5:8", "down_proj": "5:8"}
    pruned = {
        name: expected[name.split(".")[-1]]
        for name in LLAMA_LAYERS
        if ".layers.1." not in name and name.split(".")[-1] in expected
    }
    assert {layer.name: layer.pattern for layer in report.layers} == pruned
    assert_only_linears_changed(source, tmp_path / "out", [f"{name}.weight" for name in pruned])
    assert after.keys() == before.keys()
    for name, pattern in pruned.items():
        zero = after[f"{name}.weight"] == 0
        if pattern == "30%":
            assert (zero.sum(1) == round(0.3 * zero.shape[1])).all()
        else:
            n, m = map(int, pattern.split(":"))
            assert (zero.unflatten(1, (-1, m)).sum(-1) == m - n).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_magnitude_needs_no_text(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name)
    report = prune(source, output=tmp_path / "out", method="magnitude", pattern="75%")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for layer in report.layers:
        dense, sparse = before[f"{layer.name}.weight"], after[f"{layer.name}.weight"]
        smallest = dense.abs().flatten().sort().values[: round(0.75 * dense.numel())]
        assert torch.equal(sparse, dense * (dense.abs() > smallest[-1]))
        # Without text the error is that of the weights.
        lost = float((dense - sparse).square().sum() / dense.square().sum())
        assert layer.error == pytest.approx(lost, rel=1e-5)
    assert report.settings["calibration"] is None


def test_a_callers_own_solver(tmp_path: Path) -> None:
    """It is given each layer with its inputs' statistics; what it returns is rounded, its zeros made +0."""
    source = save(tmp_path / "source", "llama", torch.bfloat16)
    seen: list[tuple[int, ...]] = []

    @dataclass(frozen=True)
    class Third:
        strength: float = 1 / 3

        def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
            assert statistics.tokens == 48
            seen.append(tuple(weight.shape))
            third = weight.float() * self.strength
            third[:, 0] = -0.0
            return Solution(third)

    report = prune(source, output=tmp_path / "out", calibration=tokens(), method=Third())
    assert report.settings["method"] == {"name": "Third", "strength": 1 / 3}
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert seen == [tuple(before[f"{name}.weight"].shape) for name in LLAMA_LAYERS]
    for layer in report.layers:
        dense, sparse = before[f"{layer.name}.weight"].float(), after[f"{layer.name}.weight"]
        expected = dense * (1 / 3)
        expected[:, 0] = 0.0
        assert sparse.dtype == torch.bfloat16
        assert torch.equal(sparse.view(torch.int16), expected.to(torch.bfloat16).view(torch.int16))
        assert layer.sparsity == (sparse == 0).sum().item() / sparse.numel()


def test_the_weights_that_are_scored_are_those_that_are_stored(tmp_path: Path) -> None:
    """In bfloat16 rounding alone costs something: a solver that changes nothing but by rounding shows it."""
    source = save(tmp_path / "source", "llama", torch.bfloat16)

    @dataclass(frozen=True)
    class Nudge:
        def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
            return Solution(weight.float() * (1 + 2**-12))  # rounds back to what it was

    report = prune(source, output=tmp_path / "out", calibration=tokens(), method=Nudge())
    assert all(layer.error == 0 for layer in report.layers)


def ask_for_bfloat16(source: Path) -> None:
    """Have the configuration ask for another dtype than that of the files."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


@pytest.mark.parametrize("sparsellm", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_are_pruned_as_they_are_stored(name: str, sparsellm: bool, tmp_path: Path) -> None:
    """Whatever dtype the configuration asks the model to run in."""
    source = save(tmp_path / "source", name)
    ask_for_bfloat16(source)
    method: Any = SparseLLM(Wanda(), iterations=0) if sparsellm else Wanda()
    prune(source, output=tmp_path / "out", calibration=tokens(), method=method, target="layer")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for linear in linear_names(source):
        if not (sparsellm and linear.endswith(("down_proj.weight", "mlp.c_proj.weight"))):  # down is fitted
            assert torch.equal(after[linear], before[linear] * (after[linear] != 0)), linear


def test_descent_starts_from_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "source", "llama")
    ask_for_bfloat16(source)
    started: dict[str, Tensor] = {}

    def nothing(model: Any, index: int, stored: dict[str, Tensor], *args: Any, passes: int) -> Refined:
        started.update({f"model.layers.{index}.{name}": tensor for name, tensor in stored.items()})
        return Refined(None, 0.0, None, 24)

    monkeypatch.setattr(secateurs.pruning.block.joint, "refined_by_descent", nothing)
    prune(source, output=tmp_path / "out", calibration=tokens())
    pruned = tensors_of(tmp_path / "out")
    assert started.keys() == set(linear_names(source))
    for name, tensor in started.items():
        assert torch.equal(tensor, pruned[name]), name


@pytest.mark.parametrize("refine", [0, 1])
def test_biases_in_another_dtype_keep_it(refine: int, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "opt", torch.float16)
    mixed = {
        name: tensor.float() if name.endswith("bias") else tensor
        for name, tensor in tensors_of(source).items()
    }
    rewrite(source, mixed)
    prune(source, output=tmp_path / "out", calibration=tokens(), refine=refine)
    assert {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "out").items()} == {
        name: tensor.dtype for name, tensor in mixed.items()
    }


def test_inside_a_callers_inference_mode(tmp_path: Path) -> None:
    """The descent and the iterations need gradients."""
    source = save(tmp_path / "source", "llama")
    with torch.inference_mode():
        report = prune(source, output=tmp_path / "out", calibration=tokens(), effort="best")
    assert (len(report.refinements), len(report.mlps)) == (3, 3)


# What is refused.


def refused(pattern: str, error: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(error, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path / "llama", "llama")


def test_another_runs_folders_are_left_alone(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    prune(llama, output=output, calibration=tokens(), method="wanda")
    before = everything_in(tmp_path)
    for change in (
        {"method": "magnitude"},
        {"pattern": "2:4"},
        {"calibration": tokens(seed=1)},
        {"sequential": "linear"},
        {"batch_size": 1},
    ):
        settings: dict[str, Any] = {"calibration": tokens(), "method": "wanda", **change}
        refused(
            "out' exists and is not this run's",
            ValueError,
            lambda s=settings: prune(llama, output=output, **s),
        )
    assert everything_in(tmp_path) == before


def test_a_finished_run_is_not_repeated(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> Solution:
        raise AssertionError

    report = prune(llama, output=tmp_path / "out", calibration=tokens(), method="wanda")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(Wanda, "solve", never)
    again = prune(llama, output=tmp_path / "out", calibration=tokens(), method="wanda")
    assert again == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("after", range(4))
def test_killed_while_it_cleans_up(
    after: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of its last steps; here a file's removal is one."""
    output, partial, calls = tmp_path / "out", tmp_path / "out.partial", 0

    def remove(path: Any, **folder: Any) -> None:
        nonlocal calls
        calls += Path(path).suffix == ".json"
        if calls > after:
            raise KeyboardInterrupt
        unlink(path, **folder)

    def run() -> Report:
        return prune(llama, output=output, calibration=tokens(), method="wanda")

    unlink = os.unlink
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", remove)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert (
        len(list((partial / "progress").iterdir())) == 5 - after
    )  # what is outside, three reports, the mark
    report = Report.read(output)
    assert run() == report
    assert not partial.exists()


def test_a_finished_run_leaves_anothers_work_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, aside = tmp_path / "out", tmp_path / "aside"

    def run() -> Report:
        return prune(llama, output=output, calibration=tokens(), method="magnitude")

    run()
    output.rename(aside)
    unfinished(llama, output, monkeypatch)
    aside.rename(output)
    before = everything_in(tmp_path)
    run()
    assert everything_in(tmp_path) == before


def unfinished(llama: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what a run leaves that is stopped in its second block."""
    done = 0

    def stop(self: Wanda, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        nonlocal done
        done += 1
        if done > len(LLAMA_LINEARS) + 2:
            raise KeyboardInterrupt
        return solve(self, weight, statistics, pattern)

    solve = Wanda.solve
    with monkeypatch.context() as patch:
        patch.setattr(Wanda, "solve", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, output=output, calibration=tokens(), method="wanda")
    assert not output.exists()
    # What lies outside the blocks, and one block.
    done = {path.name for path in (output.with_name("out.partial") / "progress").iterdir()}
    assert done == {"run.json", "outside.json", "block-00000.json"}


def test_only_the_same_run_goes_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    unfinished(llama, output, monkeypatch)
    before = everything_in(tmp_path)

    def run(**change: Any) -> Report:
        return prune(llama, output=output, **{"calibration": tokens(), "method": "wanda", **change})

    message = "out.partial' holds an unfinished run with other settings"
    refused(message, ValueError, lambda: run(pattern="70%"))
    refused(message, ValueError, lambda: run(method="sparsegpt"))
    refused(message, ValueError, lambda: run(calibration=tokens(3)))
    assert everything_in(tmp_path) == before
    weights = tensors_of(llama)
    rewrite(llama, {**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    before = everything_in(tmp_path)
    refused(message, ValueError, run)
    assert everything_in(tmp_path) == before


def tick_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever phases are counted by advance a second at each look: each time inside one is a second."""
    ticking = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr(secateurs.pruning.folder, "time", ticking)


def test_every_time_in_a_phase_counts_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick_in_seconds(monkeypatch)
    report = prune(llama, output=tmp_path / "out", calibration=tokens(), method="wanda")
    # What lies outside, three blocks and the end are written; each block loaded, measured, all but the last
    # passed through, with the embedding before; and each layer solved.
    assert report.phases == {"load": 3, "run": 1 + 3 + 2, "solve": len(LLAMA_LAYERS), "refine": 0, "write": 5}


def test_a_finished_block_is_not_pruned_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(llama, tmp_path / "out", monkeypatch)
    (first,) = (tmp_path / "out.partial" / "progress").glob("block-*.json")
    spent = json.loads(first.read_text())
    first.write_text(json.dumps({**spent, "phases": {**spent["phases"], "solve": 900.0}}))
    tick_in_seconds(monkeypatch)
    solve, calls = Wanda.solve, []

    def count(self: Wanda, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        calls.append(weight.shape)
        return solve(self, weight, statistics, pattern)

    monkeypatch.setattr(Wanda, "solve", count)
    report = prune(llama, output=tmp_path / "out", calibration=tokens(), method="wanda")
    assert len(calls) == 2 * len(LLAMA_LINEARS)
    assert [layer.name for layer in report.layers] == LLAMA_LAYERS
    assert report.phases["solve"] == 900 + len(calls)


def test_folders_that_are_not_ours(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def run() -> Report:
        return prune(llama, output=output, calibration=tokens(), method="wanda")

    refused("is the model's own folder", ValueError, lambda: prune(llama, output=llama, method="magnitude"))
    link = tmp_path / "link"
    link.symlink_to(llama)
    refused("is the model's own folder", ValueError, lambda: prune(llama, output=link, method="magnitude"))

    output.write_text("a file")
    refused("out' exists and is not this run's", ValueError, run)
    assert output.read_text() == "a file"
    output.unlink()

    output.mkdir()
    (output / "notes.txt").write_text("mine")
    refused("out' exists and is not this run's", ValueError, run)
    (output / "secateurs.json").write_text("{}")
    refused("out' exists and is not this run's", ValueError, run)
    assert everything_in(output) == {"notes.txt": b"mine", "secateurs.json": b"{}"}
    shutil.rmtree(output)

    partial = tmp_path / "out.partial"
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "notes.txt").write_text("mine")
    refused("out.partial' holds an unfinished run", ValueError, run)
    assert everything_in(partial) == {"model": None, "model/notes.txt": b"mine"}
    assert not output.exists()


@pytest.mark.parametrize("linked", [False, True])
def test_an_empty_folder_may_become_the_output(llama: Path, tmp_path: Path, linked: bool) -> None:
    output = tmp_path / "out"
    (tmp_path / "elsewhere" if linked else output).mkdir()
    if linked:
        output.symlink_to(tmp_path / "elsewhere")
    prune(llama, output=output, method="magnitude")
    assert_loads(output)
    assert output.is_symlink() == linked


def test_mistakes_in_python(llama: Path, tmp_path: Path) -> None:
    before = everything_in(tmp_path)

    def run(message: str, **settings: Any) -> None:
        refused(
            message,
            ValueError,
            lambda: prune(llama, **{"output": tmp_path / "out", "method": "wanda", **settings}),
        )

    run("calibration text is needed")
    run("int64 tensor", calibration=tokens().float())
    run("int64 tensor", calibration=tokens()[0])
    run("int64 tensor", calibration=tokens()[:0])
    run("token 128 is outside of the model's vocabulary of 128", calibration=tokens() + 128 - tokens().max())
    run("token -1 is outside of the model's vocabulary of 128", calibration=tokens() - tokens().min() - 1)
    run("length 65 is more than the 64 positions", calibration=tokens(1, 65))
    run("batch_size is a number of sequences, not 0", calibration=tokens(), batch_size=0)
    run("outside", calibration=tokens(), pattern=1.5)
    assert everything_in(tmp_path) == before


def test_a_layer_that_a_solver_cannot_prune_is_named(llama: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Choosy:
        def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
            raise FloatingPointError("too few tokens")

    refused(
        r"\A'model.layers.0.self_attn.q_proj': too few tokens\Z",
        FloatingPointError,
        lambda: prune(llama, output=tmp_path / "out", calibration=tokens(), method=Choosy()),
    )


def test_values_that_the_stored_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama", torch.float16)

    @dataclass(frozen=True)
    class Large:
        def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
            return Solution(weight * 1e7)

    refused(
        "'model.layers.0.self_attn.q_proj': pruning gave values that torch.float16 cannot hold",
        FloatingPointError,
        lambda: prune(source, output=tmp_path / "out", calibration=tokens(), method=Large()),
    )


def test_the_space_that_is_asked_for_is_that_of_the_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in llama.iterdir())
    margin = 16 * 2**20

    def disk(free: int) -> Callable[[object], Any]:
        return lambda path: shutil._ntuple_diskusage(10 * size, 0, free)  # type: ignore[attr-defined]

    def run() -> Report:
        return prune(llama, output=tmp_path / "new" / "out", method="magnitude")

    header = 8_000  # of the weight file, at most: it says the same in another order
    monkeypatch.setattr(shutil, "disk_usage", disk(size + margin - header))
    refused("the output needs .* GB, the disk of '.*' has .* GB free", OSError, run)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", disk(size + margin + header))
    run()


# Runs that are cut short. A point is a moment just before something that could be cut there.


POINTS: tuple[tuple[Any, str], ...] = (
    (Path, "mkdir"),
    (Path, "write_text"),
    (shutil, "copyfile"),
    (os, "fsync"),
    (os, "replace"),
)
LATER_POINTS: tuple[tuple[Any, str], ...] = ((SparseGPT, "solve"), (Statistics, "update"), (shutil, "rmtree"))


def run_to_the_end(source: Path, output: Path) -> Report:
    return prune(
        source, output=output, calibration=tokens(4), method="sparsegpt", pattern="60%", batch_size=2
    )


def instrument(
    patch: pytest.MonkeyPatch, points: tuple[tuple[Any, str], ...], at: Callable[[int, str, Any], None]
) -> None:
    """Call `at` with the point's number, what is about to be called there and its arguments."""
    numbers = itertools.count()

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "mkdir" or ".partial" in str(args[0]):  # others make folders too, now and then
                at(next(numbers), name, args)
            return function(*args, **kwargs)

        return call

    for owner, name in points:
        patch.setattr(owner, name, wrap(name, getattr(owner, name)))


def count_points(source: Path, output: Path, points: tuple[tuple[Any, str], ...]) -> list[str]:
    """What an undisturbed run does at each point; leaves its output."""
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        instrument(patch, points, lambda number, name, args: names.append(name))
        run_to_the_end(source, output)
    return names


def shards_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


def run_and_be_killed(source: Path, output: Path, point: int, seconds: float) -> None:
    """In a process of its own: SIGKILL so many seconds after a point; each point dawdles a little."""
    torch.set_num_threads(1)

    def at(number: int, name: str, args: Any) -> None:
        if number == point:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(0.002)

    with pytest.MonkeyPatch.context() as patch:
        instrument(patch, POINTS + LATER_POINTS, at)
        run_to_the_end(source, output)
        time.sleep(10)  # the last points: wait for the end


@pytest.fixture
def processes() -> Any:
    """Processes that start fast: forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "secateurs", "accelerate", "rich.progress", "transformers.models.llama.modeling_llama"]
    )
    return context


def test_killed_ten_times_at_random_moments(tmp_path: Path, processes: Any) -> None:
    source = save(tmp_path / "source", "llama")
    names = count_points(source, tmp_path / "whole", POINTS + LATER_POINTS)
    expected = shards_of(tmp_path / "whole")
    chance = random.Random(0)
    for tenth in range(10):
        output = tmp_path / f"out{tenth}"
        point = int((tenth + chance.random()) * len(names) / 10)
        victim = processes.Process(
            target=run_and_be_killed, args=(source, output, point, chance.uniform(0, 0.01))
        )
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        if output.exists():  # killed after the last step
            assert shards_of(output) == expected
            assert_loads(output)
        run_to_the_end(source, output)
        assert shards_of(output) == expected, names[point]
        assert not output.with_name(f"{output.name}.partial").exists()


def test_killed_again_and_again(tmp_path: Path, processes: Any) -> None:
    """Each process gets a little further; whatever the earlier ones left must do."""
    source = save(tmp_path / "source", "llama")
    output = tmp_path / "out"
    names = count_points(source, tmp_path / "whole", POINTS + LATER_POINTS)
    for point in (0, 1, 3, names.index("solve") + 9, len(names) // 2):
        victim = processes.Process(target=run_and_be_killed, args=(source, output, point, 0.0))
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
    run_to_the_end(source, output)
    assert shards_of(output) == shards_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A model, what an undisturbed run makes of it, and the points of that run that write."""
    folder = tmp_path_factory.mktemp("whole")
    source = save(folder / "source", "opt")
    names = count_points(source, folder / "out", POINTS)
    return source, folder / "out", names


@pytest.mark.parametrize("share", [0.0, 0.04, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("fault", ["disk full", "Ctrl-C"])
def test_a_fault_at_any_write(
    whole: tuple[Path, Path, list[str]], share: float, fault: str, tmp_path: Path
) -> None:
    source, complete, names = whole
    output, point = tmp_path / "out", math.floor(share * (len(names) - 1))

    def at(number: int, name: str, args: Any) -> None:
        if number != point:
            return
        if fault == "Ctrl-C":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        instrument(patch, POINTS, at)
        with pytest.raises(OSError if fault == "disk full" else KeyboardInterrupt):
            run_to_the_end(source, output)
    assert not output.exists()
    assert not list(tmp_path.rglob("*.tmp"))
    run_to_the_end(source, output)
    assert shards_of(output) == shards_of(complete)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_admm_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Half-precision and transposed weights, read back from a finished block."""
    source = save(tmp_path / "source", "gpt2", torch.bfloat16)
    solver = ADMM(iterations=3, polish=2)

    def run(output: Path) -> Report:
        return prune(source, output=output, calibration=tokens(4), method=solver, pattern="2:4", batch_size=2)

    run(tmp_path / "whole")
    calls = 0

    def stop(number: int, name: str, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        instrument(patch, ((ADMM, "solve"),), stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "out")
    run(tmp_path / "out")
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
