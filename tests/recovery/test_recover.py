"""Recovering a pruned folder: what comes out, that zeros stay, and that it goes on where it was stopped."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import decoders
import folders
from secateurs import RecoverSettings, RecoveryReport, Report, compress, prune, recover
from secateurs.calibration import sequences
from secateurs.pruning import walk
from secateurs.recovery import run as module
from secateurs.recovery import steps
from secateurs.recovery.steps import hold_out
from secateurs.training.watch import Watch
from secateurs.values import SCALES

TEXT = "".join(f"It was the {number}th cold evening, and nobody had lit a fire. " for number in range(150))
QUICK: dict[str, Any] = {"length": 32, "tokens": 3_072, "learning_rate": 3e-3, "device": "cpu"}
PRUNING: dict[str, Any] = {"samples": 8, "length": 32, "pattern": "60%", "method": "wanda", "device": "cpu"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return decoders.save("llama", tmp_path / "dense")


@pytest.fixture
def pruned(dense: Path, text: Path, tmp_path: Path) -> Path:
    prune(dense, output=tmp_path / "pruned", calibration=text, **PRUNING)
    return tmp_path / "pruned"


def check_zeros(before: Path, after: Path) -> None:
    """The same names, dtypes and zeros, every one of them +0."""
    old, new = folders.tensors_of(before), folders.tensors_of(after)
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        assert tensor.dtype == old[name].dtype
        assert tensor.isfinite().all()
        assert torch.equal(tensor == 0, old[name] == 0), name
        assert not torch.signbit(tensor[tensor == 0]).any()


def kl(dense: Path, model: Path, ids: torch.Tensor) -> float:
    """Mean over all positions, in float64, as transformers loads the folders."""
    with torch.no_grad():
        wanted, given = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.double()
            for folder in (dense, model)
        )
    wanted, given = wanted.log_softmax(-1), given.log_softmax(-1)
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


def test_what_comes_out(dense: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    inputs = folders.bytes_of(dense), folders.bytes_of(pruned)
    report = recover(pruned, towards=dense, calibration=text, output=tmp_path / "out", **QUICK)
    assert (folders.bytes_of(dense), folders.bytes_of(pruned)) == inputs
    assert report == RecoveryReport.read(tmp_path / "out")
    assert report.steps == 6
    assert report.tokens == QUICK["tokens"]
    assert report.kept
    assert report.after < 0.9 * report.before
    check_zeros(pruned, tmp_path / "out")
    before, after = folders.tensors_of(pruned), folders.tensors_of(tmp_path / "out")
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert report.zeros == sum(layer.sparsity * layer.weights for layer in Report.read(pruned).layers)
    # What pruning did stays on record.
    assert Report.read(tmp_path / "out").layers == Report.read(pruned).layers
    assert f"{report.before:.4f} before, {report.after:.4f} after" in (tmp_path / "out/README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "pruned", "text.txt"]
    # The same again is there already.
    assert recover(pruned, towards=dense, calibration=text, output=tmp_path / "out", **QUICK) == report


def test_the_losses_are_those_of_the_folders(dense: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    ids = AutoTokenizer.from_pretrained(dense)(text.read_text(), return_tensors="pt").input_ids[0]
    tokens = ids[: len(ids) // 32 * 32].view(-1, 32)
    settings: dict[str, Any] = {**QUICK, "calibration": tokens, "length": None}
    report = recover(pruned, towards=dense, output=tmp_path / "out", **settings)
    [_, held] = hold_out(tokens, len(tokens) // 8, seed=0)
    assert report.before == pytest.approx(kl(dense, pruned, held), rel=0.03)  # products are in bfloat16
    assert report.after == pytest.approx(kl(dense, tmp_path / "out", held), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_groups(dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    """OPT: with biases, and with dropout in its configuration."""
    dense = decoders.save("opt", tmp_path / "dense", dtype)
    prune(dense, output=tmp_path / "pruned", calibration=text, **{**PRUNING, "pattern": "2:4"})
    report = recover(tmp_path / "pruned", towards=dense, calibration=text, output=tmp_path / "out", **QUICK)
    assert report.kept
    check_zeros(tmp_path / "pruned", tmp_path / "out")
    after = folders.tensors_of(tmp_path / "out")
    weight = next(tensor for name, tensor in after.items() if name.endswith("fc1.weight"))
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()


def test_adapters_are_merged(dense: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    report = recover(pruned, towards=dense, calibration=text, output=tmp_path / "out", lora=4, **QUICK)
    assert report.kept
    check_zeros(pruned, tmp_path / "out")
    before, after = folders.tensors_of(pruned), folders.tensors_of(tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert torch.equal(before[name], after[name])


class Stop(Exception):  # noqa: N818
    """As if somebody had pulled the plug."""


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Stop runs once this step was made and saved."""
    on_save = Watch.on_save

    def stop(self: Watch, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        on_save(self, args, state, *rest, **more)
        if state.global_step >= step:
            raise Stop

    patch.setattr(Watch, "on_save", stop)


@pytest.mark.parametrize("values", [None, "int4:group=32"])
def test_a_stopped_run_ends_like_one_that_was_not(
    values: str | None, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = tmp_path / "pruned"
    method = {} if values is None else {"method": "sparsegpt"}
    prune(dense, output=pruned, calibration=text, values=values, **{**PRUNING, **method})
    arguments = {**QUICK, "towards": dense, "calibration": text}
    whole = recover(pruned, output=tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stop):
            recover(pruned, output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unfinished run with other settings"):
        recover(pruned, output=tmp_path / "out", **{**arguments, "seed": 1})
    resumed = recover(pruned, output=tmp_path / "out", **arguments)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert load_file(tmp_path / "out/model.safetensors").keys()
    for file in ("model.safetensors", "config.json", *([] if values is None else [SCALES])):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_text_that_the_dense_model_writes(
    dense: Path, pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half of it, written once: a run that goes on finds it."""
    arguments = {**QUICK, "towards": dense, "calibration": [text, "self"], "samples": 64}
    whole = recover(pruned, output=tmp_path / "whole", **arguments)
    calibration = whole.settings["calibration"]
    assert {name: part["samples"] for name, part in calibration["source"].items()} == {
        str(text): 32,
        "self": 32,
    }
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stop):
            recover(pruned, output=tmp_path / "out", **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(sequences, "write", None)
        resumed = recover(pruned, output=tmp_path / "out", **arguments)
    assert resumed.settings["calibration"] == calibration
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert (
        folders.bytes_of(tmp_path / "out")["model.safetensors"]
        == (folders.bytes_of(tmp_path / "whole")["model.safetensors"])
    )
    check_zeros(pruned, tmp_path / "out")


def test_without_a_text_the_dense_model_writes_all(dense: Path, pruned: Path, tmp_path: Path) -> None:
    report = recover(pruned, towards=dense, output=tmp_path / "out", samples=16, **QUICK)
    assert report.kept
    assert report.settings["calibration"]["source"]["self"]["samples"] == 16


def test_of_a_model_with_fewer_experts(text: Path, tmp_path: Path) -> None:
    """Towards the dense one, which has all of them."""
    dense = decoders.save("mixtral", tmp_path / "dense")
    settings = {**PRUNING, "calibration": text, "experts": "50%", "recover": 1_024}
    prune(dense, output=tmp_path / "out", **settings)
    report = RecoveryReport.read(tmp_path / "out")
    assert report.steps == 2
    ids = torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    assert kl(dense, tmp_path / "out", ids) < 10


def test_after_pruning(
    dense: Path, pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one command, stopped in between and gone on with: the blocks are not pruned again."""
    arguments = {**PRUNING, "calibration": text, "output": tmp_path / "out", "recover": 1_536}
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Stop):
            prune(dense, **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out.partial", "pruned", "text.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(walk, "_walk", None)
        report = prune(dense, **arguments)
        assert prune(dense, **arguments) == report  # which was all done
    assert report.sparsity == Report.read(pruned).sparsity
    check_zeros(pruned, tmp_path / "out")
    recovery = RecoveryReport.read(tmp_path / "out")
    assert recovery.kept
    assert recovery.steps == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "pruned", "text.txt"]
    with pytest.raises(ValueError, match="is not this run's"):
        prune(dense, **{**arguments, "recover": 0})


@pytest.mark.parametrize("recover", [0, 2_048])
def test_who_asks_for_other_tokens_or_none_goes_on_from_the_pruned_model(
    recover: int, dense: Path, pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where recovery cannot be ended, as memory is too small for it, say."""
    arguments = {**PRUNING, "calibration": text, "output": tmp_path / "out"}
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Stop):
            prune(dense, **arguments, recover=1_536)
    with monkeypatch.context() as patch:
        patch.setattr(walk, "_walk", None)
        prune(dense, **arguments, recover=recover)
    record = json.loads((tmp_path / "out" / "secateurs.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "pruned", "text.txt"]
    if recover:
        assert record["recovery"]["tokens"] == recover
        return
    assert "recovery" not in record
    assert record["settings"] == json.loads((pruned / "secateurs.json").read_text())["settings"]
    found, plain = folders.tensors_of(tmp_path / "out"), folders.tensors_of(pruned)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert (tmp_path / "out" / "README.md").read_bytes() == (pruned / "README.md").read_bytes()


def test_what_stops_recovery_is_found_before_pruning(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {**PRUNING, "calibration": text, "output": tmp_path / "out", "recover": 1_536}
    monkeypatch.setattr(walk, "_walk", None)
    with monkeypatch.context() as patch:
        patch.setattr(module.TrainingArguments, "n_gpu", 2)
        with pytest.raises(ValueError, match="several GPUs, one process"):
            prune(dense, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
        with pytest.raises(
            ValueError, match=r"recovery needs at least .* for the two models, there are 0\.0 GB"
        ):
            prune(dense, **arguments)


@pytest.mark.parametrize(("batch_size", "at_once", "steps"), [(None, 8, 6), (4, 4, 6), (32, 32, 3)])
def test_a_file_of_settings_may_say_how_many_at_once(
    batch_size: int | None, at_once: int, steps: int, dense: Path, pruned: Path, text: Path, tmp_path: Path
) -> None:
    """A step has 512 tokens, or of more at once as many as these are; an option comes before the file."""
    file = tmp_path / "settings.yaml"
    file.write_text("per_device_train_batch_size: 8")
    paths: dict[str, Any] = {"towards": dense, "calibration": text, "output": tmp_path / "out"}
    report = recover(pruned, settings=file, batch_size=batch_size, **paths, **QUICK)
    assert (report.steps, report.tokens) == (steps, QUICK["tokens"])
    trainer = report.settings["trainer"]
    assert trainer["per_device_train_batch_size"] == at_once
    assert trainer["gradient_accumulation_steps"] == max(1, 512 // 32 // at_once)


@pytest.mark.parametrize(
    ("file", "told", "expected"),
    [
        ("", {}, 1.5e-4),
        ("gradient_accumulation_steps: 8", {}, 1.5e-4 * 8**0.5),
        ("gradient_accumulation_steps: 8", {"lora": 4, "batch_size": 4}, 5e-4 * 2**0.5),
        ("learning_rate: 0.01", {"batch_size": 64}, 0.01),
        ("learning_rate: 0.01", {"learning_rate": 0.02}, 0.02),
    ],
)
def test_the_rate_follows_the_size_of_a_step(
    file: str, told: dict[str, Any], expected: float, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(file or "{}")
    whole = RecoverSettings(output="out", towards="dense", settings=settings, device="cpu", **told)
    assert module._trainer(whole, 32, 1)["learning_rate"] == pytest.approx(expected)


def test_what_blocks_give_is_recovered_too(
    dense: Path, pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is so with checkpointed activations, where blocks run twice."""
    file = tmp_path / "settings.yaml"
    file.write_text("gradient_checkpointing: true")
    arguments = {**QUICK, "towards": dense, "calibration": text}
    recover(pruned, output=tmp_path / "whole", **arguments)
    recover(pruned, output=tmp_path / "checkpointed", settings=file, **arguments)
    for name, tensor in folders.tensors_of(tmp_path / "whole").items():
        assert torch.equal(folders.tensors_of(tmp_path / "checkpointed")[name], tensor)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "STATES", 0.0)
        recover(pruned, output=tmp_path / "predictions", **arguments)
    ids = AutoTokenizer.from_pretrained(dense)(text.read_text(), return_tensors="pt").input_ids[:, :32]
    states = {}
    for folder in (tmp_path / "whole", tmp_path / "predictions", dense):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():  # without the last, which are normed
            states[folder.name] = torch.stack(model(ids, output_hidden_states=True).hidden_states[1:-1])
    wanted = states["dense"]
    whole, predictions = (
        ((states[name] - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().mean()
        for name in ("whole", "predictions")
    )
    assert whole < 0.9 * predictions


def test_blocks_are_compared_where_they_are_alike(tmp_path: Path) -> None:
    models = [decoders.build(name) for name in ("llama", "llama", "opt")]
    assert steps.blocks_alike(models[0], decoders.build("llama", seed=1)) == []  # trained apart, as it were
    with torch.no_grad(), steps.results_of(steps.blocks_alike(*models[:2])) as results:
        for model in models[:2]:
            model(torch.arange(3, 9)[None])
    count = models[0].config.num_hidden_layers
    assert [[states.shape for states in each] for each in results] == [[(1, 6, 64)] * count] * 2
    assert not any(block._forward_hooks for block in models[0].model.layers)
    assert steps.blocks_alike(models[0], models[2]) == []


def test_where_nothing_is_gained_weights_stay(dense: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    worse = {**QUICK, "tokens": 1024, "learning_rate": 2.0}
    report = recover(pruned, towards=dense, calibration=text, output=tmp_path / "out", **worse)
    assert not report.kept
    assert "nothing was gained: the weights are as they were" in str(report)
    before, after = folders.tensors_of(pruned), folders.tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_teacher_of_another_shape_with_a_padded_vocabulary(
    pruned: Path, text: Path, tmp_path: Path
) -> None:
    """The tokenizer has ids below 127, the teacher two rows more than the pruned model's 128."""
    other = decoders.save("opt", tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(130)
    model.save_pretrained(other)
    report = recover(pruned, towards=other, calibration=text, output=tmp_path / "out", **QUICK)
    assert report.kept


def test_a_model_without_zeros(dense: Path, text: Path, tmp_path: Path) -> None:
    other = decoders.build("llama", seed=1)
    whole = tmp_path / "whole"
    other.save_pretrained(whole)
    AutoTokenizer.from_pretrained(dense).save_pretrained(whole)
    with pytest.warns(UserWarning, match="no zeros: all its weights"):
        report = recover(whole, towards=dense, calibration=text, output=tmp_path / "out", **QUICK)
    assert report.zeros == 0


def test_mistakes_are_found_before_the_work(
    dense: Path, pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", None)
    compress(pruned, tmp_path / "compressed")
    other = tmp_path / "other"
    other.mkdir()
    for path in dense.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    longer = tmp_path / "longer.yaml"
    longer.write_text("max_steps: 7")
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:40])
    for changed, message in (
        ({"towards": other}, "the vocabularies do not agree: token 97 is 'a' in"),
        ({"towards": tmp_path / "compressed"}, "is compressed: secateurs decompress"),
        ({"towards": tmp_path / "nowhere"}, "no model folder at"),
        ({"calibration": short}, "give more text"),
        ({"calibration": torch.ones(1, 8, dtype=torch.int64)}, "give two or more"),
        ({"calibration": torch.full((4, 8), 999)}, "token 999 is outside"),
        ({"length": 999}, "sequences of 999 tokens"),
        ({"calibration": [text, "self=200%"]}, "above 0 and up to 1"),
        ({"tokens": 0}, "tokens are at least 1"),
        ({"text_loss": 1.5}, "a share from 0 to 1"),
        ({"learning_rate": float("nan")}, "learning_rate is"),
        ({"device": "cuda:1"}, "is no device to train on"),
        ({"settings": longer}, "'max_steps' is not for this file to say, but for --tokens"),
    ):
        given = {"towards": dense, "calibration": text, "output": tmp_path / "out", **QUICK, **changed}
        with pytest.raises(ValueError, match=message):
            recover(pruned, **given)
    with pytest.raises(ValueError, match="is compressed: secateurs decompress"):
        recover(tmp_path / "compressed", towards=dense, calibration=text, output=tmp_path / "out", **QUICK)
    with pytest.raises(ValueError, match="calibration text is needed to recover"):
        prune(dense, output=tmp_path / "out", method="magnitude", recover=2048)
    assert not list(tmp_path.glob("out*"))


def test_what_a_model_wrote_with_a_common_head_is_not_dropped() -> None:
    tokens = torch.randint(0, 1000, (40, 64), generator=torch.Generator().manual_seed(0))
    tokens[:20, :40] = torch.arange(40)
    written = torch.arange(40) < 20
    rest, held = hold_out(tokens, 8, 0, written)
    assert len(rest) == 32
    alike, _ = hold_out(tokens, 8, 0)
    assert len(alike) == 40 - 8 - (20 - int((held[:, :40] == torch.arange(40)).all(dim=1).sum()))


def test_held_out_sequences_have_no_place_in_common_with_the_others() -> None:
    """Blocks at random places of one text of tokens that are all different."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(20_000, (300,), generator=generator)
    tokens = starts[:, None] + torch.arange(64)
    rest, held = hold_out(tokens, 20, seed=3)
    assert len(held) == 20
    common = (rest[:, None, :1] - held[None, :, :1]).abs().squeeze(-1)  # between first tokens
    assert (64 - common < 32).all()
    assert len(rest) > 200
