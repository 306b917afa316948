"""Training a model folder: what comes out, and that an interrupted run ends like one that was not."""

import errno
import importlib.util
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import decoders
import folders
from secateurs import compress, inspect, perplexity, prune
from secateurs.training.arguments import PACKAGES, read_settings
from secateurs.training.data import CHAT_TEMPLATE, packed_blocks
from secateurs.training.report import TrainingReport
from secateurs.training.run import train
from secateurs.training.watch import Watch
from secateurs.training.weights import StoredWeights

TEXT = "".join(f"It was the {number}th cold evening, and nobody had lit a fire. " for number in range(60))
QUICK: dict[str, Any] = {"length": 32, "batch_size": 4, "learning_rate": 3e-3, "device": "cpu"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folders.save(tmp_path / "model", "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    file = tmp_path / "chat.jsonl"
    rows = [{"question": f"{a}+{b}?", "answer": f"{a + b}"} for a in range(6) for b in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_pre_training(model: Path, text: Path, tmp_path: Path) -> None:
    before = folders.bytes_of(model)
    report = train(model, output=tmp_path / "out", text=text, validation=text, steps=20, **QUICK)
    assert folders.bytes_of(model) == before
    assert report.steps == 20
    assert report.tokens == 20 * 4 * 32
    assert report.seconds > 0
    assert report.flops is not None
    assert report.dense_flops is not None
    assert 0.3 < report.flops / report.dense_flops < 1
    assert report.history is not None
    logged = [entry for entry in report.history if "loss" in entry]
    assert [entry["step"] for entry in logged] == sorted({entry["step"] for entry in logged})
    recent = [entry["loss"] for entry in logged if entry["step"] > 18]
    assert report.train_loss == pytest.approx(sum(recent) / len(recent))
    assert logged[0]["omission_rate"] == 0.5
    assert logged[-1]["omission_rate"] == 0
    assert [entry["tokens"] for entry in logged] == [entry["step"] * 4 * 32 for entry in logged]
    times = [entry["seconds"] for entry in report.history]
    assert 0 < times[0] < times[-1] == report.seconds
    assert times == sorted(times)
    assert logged[-1]["speedup_by_flops"] == pytest.approx(report.dense_flops / report.flops)
    for block in range(2):
        for units in ("heads", "channels"):
            shares = [e[f"{units}_kept/{block}"] for e in logged if f"{units}_kept/{block}" in e]
            assert shares[0] <= 0.5
            assert shares[-1] == 1
            assert shares == sorted(shares)
    assert report.history[-1]["eval_loss"] == report.validation_loss
    assert TrainingReport.read(tmp_path / "out") == report
    blocks = packed_blocks(text, AutoTokenizer.from_pretrained(model), length=32)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    losses = {}
    for name, folder in (("before", model), ("after", tmp_path / "out")):
        whole = AutoModelForCausalLM.from_pretrained(folder).eval()
        losses[name] = math.log(perplexity(whole, blocks.flatten(), length=32))
    assert losses["after"] < losses["before"] - 1
    assert report.validation_loss == pytest.approx(losses["after"], rel=1e-3)
    assert trained.config.use_cache == AutoModelForCausalLM.from_pretrained(model).config.use_cache
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


def test_text_needs_no_padding_token(model: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model)
    assert train(model, output=tmp_path / "out", text=text, steps=2, **QUICK).steps == 2


def test_without_omission_it_is_plain_training(model: Path, text: Path, tmp_path: Path) -> None:
    """Against a loop written here: AdamW at a constant rate on the blocks in Trainer's order."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "lr_scheduler_type: constant\nmax_grad_norm: 0\ntrain_sampling_strategy: sequential\nbf16: false\n"
    )
    report = train(
        model, output=tmp_path / "out", text=text, omission=0, steps=5, warmup=0, settings=settings, **QUICK
    )
    assert report.flops is None
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0)
    blocks = packed_blocks(text, AutoTokenizer.from_pretrained(model), length=32)
    for batch in blocks.split(4)[:5]:
        logits = plain(input_ids=batch).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = folders.tensors_of(tmp_path / "out")
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("able", [True, False])
def test_products_are_in_bfloat16_where_a_processor_has_them(
    able: bool, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    seen = set()
    linear = functional.linear

    def watched(states: torch.Tensor, *given: Any) -> torch.Tensor:
        product = linear(states, *given)
        seen.add(product.dtype)
        return product

    monkeypatch.setattr(functional, "linear", watched)
    report = train(model, output=tmp_path / "out", text=text, omission=0, steps=2, **QUICK)
    assert report.settings["trainer"]["bf16"] is able
    assert (torch.bfloat16 in seen) is able


def test_trainers_of_other_precisions_go_on_beside_it(model: Path, text: Path, tmp_path: Path) -> None:
    """Of arguments that were there before."""
    arguments = TrainingArguments(str(tmp_path / "own"), use_cpu=True, bf16=False, report_to="none")
    assert arguments.device.type == "cpu"
    settings = tmp_path / "settings.yaml"
    settings.write_text("bf16: true")
    train(model, output=tmp_path / "out", text=text, steps=2, settings=settings, **QUICK)
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(model), arguments)
    assert trainer.accelerator.mixed_precision == "no"


def test_weights_come_out_in_the_dtype_they_came_in(text: Path, tmp_path: Path) -> None:
    model = folders.save(tmp_path / "model", "opt", torch.bfloat16)
    train(model, output=tmp_path / "out", text=text, steps=3, **QUICK)
    before, after = folders.tensors_of(model), folders.tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_fine_tuning(model: Path, chat: Path, tmp_path: Path) -> None:
    report = train(model, output=tmp_path / "out", chat=chat, validation=chat, epochs=3, **QUICK)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert report.steps == 27
    assert report.unpadded
    assert report.validation_loss is not None
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    losses = []
    for line in chat.read_text().splitlines():
        row = json.loads(line)
        question = tokenizer(f"<s>User: {row['question']}\nAssistant:", return_tensors="pt").input_ids
        # The test's tokenizer knows characters, and its special tokens by their text.
        answer = torch.tensor([[*map(ord, " " + row["answer"]), tokenizer.eos_token_id]])
        ids = torch.cat([question, answer], dim=1)
        with torch.no_grad():
            logits = whole(input_ids=ids).logits[0, question.shape[1] - 1 : -1]
        losses.append(functional.cross_entropy(logits, answer[0]).item())
    assert report.validation_loss == pytest.approx(sum(losses) / len(losses), rel=0.02)


def test_contexts_that_are_only_read(model: Path, chat: Path, tmp_path: Path) -> None:
    reports = {
        context: train(
            model, output=tmp_path / context, chat=chat, validation=chat, epochs=3, context=context, **QUICK
        )
        for context in ("learn", "read")
    }
    learn, read = reports["learn"], reports["read"]
    assert read.settings["context"] == "read"
    assert read.tokens == learn.tokens
    assert read.dense_flops == pytest.approx(learn.dense_flops)
    assert read.flops is not None
    assert learn.flops is not None
    assert read.flops < 0.6 * learn.flops  # answers are a sixth of these conversations
    assert read.validation_loss == pytest.approx(learn.validation_loss, rel=0.1)
    assert read.validation_loss != learn.validation_loss
    assert dict(read.facts)["Context"] == "only read"
    assert "Context" not in dict(learn.facts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mamba", "logging_steps: 1", "does not take a text in parts"),
        ("llama", "gradient_checkpointing: true", "only read without gradient_checkpointing"),
        ("llama", "label_smoothing_factor: 0.1", "only read without label_smoothing_factor"),
        ("llama", "neftune_noise_alpha: 5", "only read without neftune_noise_alpha"),
        ("qwen3_moe", "logging_steps: 1", "only read without the routers' loss"),
    ],
)
def test_contexts_that_cannot_be_read(
    name: str, content: str, message: str, chat: Path, tmp_path: Path
) -> None:
    model, settings = decoders.save(name, tmp_path / "model"), tmp_path / "settings.yaml"
    settings.write_text(content)
    before = folders.everything_in(tmp_path)
    told = {"chat": chat, "context": "read", "omission": 0.0, "settings": settings, **QUICK}
    with pytest.raises(ValueError, match=message):
        train(model, output=tmp_path / "out", **told)
    assert folders.everything_in(tmp_path) == before


def test_contexts_of_experts(chat: Path, tmp_path: Path) -> None:
    model, settings = decoders.save("qwen3_moe", tmp_path / "model"), tmp_path / "settings.yaml"
    settings.write_text("router_aux_loss_coef: 0.0")
    told = {"chat": chat, "context": "read", "omission": 0.0, "settings": settings, "steps": 2, **QUICK}
    assert train(model, output=tmp_path / "out", **told).steps == 2


def test_the_output_is_the_input_with_other_weights(model: Path, chat: Path, tmp_path: Path) -> None:
    """As transformers 4 and others wrote it, and with what saving would refuse."""
    config = json.loads((model / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    (model / "config.json").write_text(json.dumps({**config, "temperature": 0.7}))
    (model / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    (model / "tokenizer.model").write_bytes(b"pieces")
    (model / "LICENSE").write_text("Be kind.")
    before = folders.bytes_of(model)
    train(model, output=tmp_path / "out", chat=chat, steps=3, max_shard_size=50_000, **QUICK)
    after = folders.bytes_of(tmp_path / "out")
    assert {name: after[name] for name in before if not name.endswith(".safetensors")} == {
        name: content for name, content in before.items() if not name.endswith(".safetensors")
    }
    shards = {name for name in after if name.endswith(".safetensors")}
    assert len(shards) > 1
    added = {"chat_template.jinja", "secateurs.json", "model.safetensors.index.json"}
    assert after.keys() - before.keys() - shards - {"README.md"} == added
    for tensor in folders.tensors_of(tmp_path / "out").values():
        assert tensor.dtype == torch.float32


def test_a_template_of_the_models_own_stays(model: Path, chat: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("User", "Reader")
    tokenizer.save_pretrained(model)
    before = folders.bytes_of(model)
    train(model, output=tmp_path / "out", chat=chat, steps=2, **QUICK)
    after = folders.bytes_of(tmp_path / "out")
    assert after.keys() - {"README.md"} == before.keys() | {"secateurs.json"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("lora", [None, 2])
def test_other_data_to_validate_on_are_measured_on_the_finished_output(
    lora: int | None, model: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    arguments: dict[str, Any] = {"text": text, "steps": 3, "lora": lora, **QUICK}
    train(model, output=tmp_path / "out", **arguments)
    weights = folders.tensors_of(tmp_path / "out")
    losses = {}
    for name in (text, other, text):
        report = train(model, output=tmp_path / "out", validation=name, **arguments)
        assert report.validation is not None
        assert report.validation["data"] == str(name)
        assert str(report).endswith(f" on {name}")
        assert report == TrainingReport.read(tmp_path / "out")
        direct = train(model, output=tmp_path / name.stem, validation=name, **arguments)
        assert report.validation_loss == direct.validation_loss
        losses[name] = report.validation_loss
    assert losses[text] != losses[other]
    for name, tensor in folders.tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, weights[name])
    assert not list(tmp_path.glob("*.partial"))


def test_data_that_training_looks_at_are_part_of_the_run(model: Path, text: Path, tmp_path: Path) -> None:
    other, settings = tmp_path / "other.txt", tmp_path / "settings.yaml"
    other.write_text(TEXT[::-1])
    settings.write_text("eval_strategy: steps\neval_steps: 1\n")
    arguments: dict[str, Any] = {"text": text, "steps": 2, "settings": settings, **QUICK}
    train(model, output=tmp_path / "out", validation=text, **arguments)
    with pytest.raises(ValueError, match="exists and is not this run's"):
        train(model, output=tmp_path / "out", validation=other, **arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: {"max_shard_size": "1MB"},
        lambda folder: {"lora": 2},
        lambda folder: (folder / "model" / "chat_template.jinja").write_text("{{ messages }}") and {},
        lambda folder: (folder / "text.txt").write_text("Once. " + TEXT) and {},
        lambda folder: (folder / "settings.yaml").write_text("weight_decay: 0.2") and {},
    ],
)
def test_what_changes_the_output_makes_another_run(
    change: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("weight_decay: 0.1")
    arguments: dict[str, Any] = {"text": text, "steps": 2, "settings": settings, **QUICK}
    train(model, output=tmp_path / "out", **arguments)
    with pytest.raises(ValueError, match="exists and is not this run's"):
        train(model, output=tmp_path / "out", **(arguments | change(tmp_path)))


def test_a_pruned_model_keeps_its_zeros(model: Path, text: Path, tmp_path: Path) -> None:
    prune(model, output=tmp_path / "sparse", method="magnitude", pattern="60%", device="cpu")
    zeros = {name: tensor == 0 for name, tensor in folders.tensors_of(tmp_path / "sparse").items()}
    for lora in (None, 2):
        out = tmp_path / f"out-{lora}"
        train(tmp_path / "sparse", output=out, text=text, steps=8, lora=lora, **QUICK)
        weights = folders.tensors_of(out)
        assert weights.keys() == zeros.keys()
        for name, tensor in weights.items():
            if "_proj" in name:
                assert (tensor[zeros[name]] == 0).all()
                assert (tensor == 0).double().mean() == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(("pattern", "lora"), [("70%", None), ("2:4", None), ("2:4", 2)])
def test_a_dense_model_can_be_pruned_on_the_way(
    pattern: str, lora: int | None, model: Path, text: Path, tmp_path: Path
) -> None:
    report = train(model, output=tmp_path / "out", text=text, steps=12, lora=lora, prune_to=pattern, **QUICK)
    assert report.pruning is not None
    assert (report.pruning["pattern"], report.pruning["end"]) == (pattern, 7)
    assert f"pruned to {pattern} by step 7: " in str(report)
    found = inspect(tmp_path / "out")
    assert report.pruning["sparsity"] == {layer.name: layer.sparsity for layer in found.layers}
    assert found.sparsity == pytest.approx(0.7 if pattern == "70%" else 0.5, abs=1e-3)
    assert pattern == "70%" or {layer.pattern for layer in found.layers} == {"2:4"}
    assert not any(
        torch.signbit(tensor[tensor == 0]).any() for tensor in folders.tensors_of(tmp_path / "out").values()
    )
    compress(tmp_path / "out", tmp_path / "small")
    again = train(model, output=tmp_path / "out", text=text, steps=12, lora=lora, prune_to=pattern, **QUICK)
    assert again == report == TrainingReport.read(tmp_path / "out")


def test_pruning_on_the_way_goes_on_with_the_masks_of_its_checkpoint(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"text": text, "steps": 20, "prune_to": "70%", "lora": 2, **QUICK}
    train(model, output=tmp_path / "whole", **arguments)
    on_step_end = Watch.on_step_end

    def fail(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 9:
            raise _PowerFails

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", fail)
        with pytest.raises(_PowerFails):
            train(model, output=tmp_path / "out", **arguments)
    train(model, output=tmp_path / "out", **arguments)
    one, other = folders.tensors_of(tmp_path / "whole"), folders.tensors_of(tmp_path / "out")
    for name, tensor in one.items():
        assert torch.equal(tensor == 0, other[name] == 0)
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_sparser_already_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    prune(model, output=tmp_path / "sparse", method="magnitude", pattern="60%", device="cpu")
    with pytest.raises(ValueError, match=r"the model has 60\.0% zeros already, more than 50% asks for"):
        train(tmp_path / "sparse", output=tmp_path / "out", text=text, steps=5, prune_to="50%", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "sparse", "text.txt"]


class _PowerFails(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("data", ["text", "chat"])
def test_an_interrupted_run_ends_like_one_that_was_not(
    data: str, model: Path, text: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {data: {"text": text, "chat": chat}[data], "steps": 20, **QUICK}
    whole = train(model, output=tmp_path / "whole", **arguments)
    on_step_end = Watch.on_step_end

    def fail(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 13:
            raise _PowerFails

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", fail)
        with pytest.raises(_PowerFails):
            train(model, output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    cut_off = tmp_path / "out.partial" / "checkpoints" / "checkpoint-14"
    cut_off.mkdir()  # as one that was being written
    resumed = train(model, output=tmp_path / "out", **arguments)
    assert resumed.tokens == whole.tokens
    assert resumed.flops == pytest.approx(whole.flops)
    assert resumed.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
    one, other = folders.tensors_of(tmp_path / "whole"), folders.tensors_of(tmp_path / "out")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def _fails(kind: str, path: str) -> None:
    """As each library fails at a disk that is full."""
    if kind == "torch":
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    if kind == "safetensors":
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.mark.parametrize(
    ("kind", "what", "whole"),
    [
        ("safetensors", "_save", "checkpoint-4"),
        ("torch", "_save_optimizer_and_scheduler", "checkpoint-4"),
        ("system", "_save_rng_state", "checkpoint-4"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    kind: str, what: str, whole: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"text": text, "steps": 20, **QUICK}
    save = getattr(Trainer, what)

    def fail(self: Trainer, folder: str, *rest: Any, **keywords: Any) -> Any:
        if self.state.global_step == 6:
            _fails(kind, folder)
        return save(self, folder, *rest, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, what, fail)
        with pytest.raises(OSError, match=rf"cannot write a checkpoint in .* goes on from '{whole}'$"):
            train(model, output=tmp_path / "out", **arguments)
    checkpoints = tmp_path / "out.partial" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    resumed = train(model, output=tmp_path / "out", **arguments)
    straight = train(model, output=tmp_path / "straight", **arguments)
    assert resumed.train_loss == pytest.approx(straight.train_loss, rel=1e-5)
    one, other = folders.tensors_of(tmp_path / "out"), folders.tensors_of(tmp_path / "straight")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_it_goes_on_after_its_last_step(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"text": text, "steps": 4, **QUICK}
    with monkeypatch.context() as patch:
        patch.setattr(StoredWeights, "write", lambda *_, **__: _fails("system", "out"))
        with pytest.raises(OSError, match="No space left"):
            train(model, output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    resumed = train(model, output=tmp_path / "out", **arguments)
    straight = train(model, output=tmp_path / "straight", **arguments)
    assert resumed.train_loss == straight.train_loss
    assert resumed.flops == straight.flops
    one, other = folders.tensors_of(tmp_path / "out"), folders.tensors_of(tmp_path / "straight")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("limit", [1, 2])
def test_whole_checkpoints_alone_count_towards_the_limit(
    limit: int, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"save_total_limit: {limit}\nsave_steps: 2")
    arguments: dict[str, Any] = {"text": text, "steps": 10, "settings": settings, **QUICK}
    on_save = Watch.on_save

    def fail(self: Watch, args: Any, state: Any, *rest: Any, **keywords: Any) -> None:
        if state.global_step == 8:  # all is there but what says so
            raise _PowerFails
        on_save(self, args, state, *rest, **keywords)

    monkeypatch.setattr(Watch, "on_save", fail)
    with pytest.raises(_PowerFails):
        train(model, output=tmp_path / "out", **arguments)
    checkpoints = tmp_path / "out.partial" / "checkpoints"
    expected = {f"checkpoint-{step}" for step in (2, 4, 6)[-limit:]} | {"checkpoint-8"}
    assert {path.name for path in checkpoints.iterdir()} == expected
    started: list[int] = []

    def note(_: Watch, args: Any, state: Any, *rest: Any, **keywords: Any) -> None:
        started.append(state.global_step)
        raise _PowerFails

    monkeypatch.setattr(Watch, "on_train_begin", note)
    with pytest.raises(_PowerFails):
        train(model, output=tmp_path / "out", **arguments)
    assert started == [6]
    assert {path.name for path in checkpoints.iterdir()} == expected - {"checkpoint-8"}


@pytest.mark.parametrize(("lora", "room"), [(None, 3), (2, 1)])
def test_a_disk_that_is_too_small_is_found_before_the_work(
    lora: int | None, room: int, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (model / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=size // 2 if lora else room * 3 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    before = folders.everything_in(tmp_path)
    with pytest.raises(OSError, match=r"checkpoints and the output need .* GB free"):
        train(model, output=tmp_path / "out", text=text, steps=20, lora=lora, **QUICK)
    assert folders.everything_in(tmp_path) == before


def test_repeated_it_changes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"output": tmp_path / "out", "text": text, "steps": 3, **QUICK}
    report = train(model, **arguments)
    before = folders.everything_in(tmp_path)
    assert train(model, **arguments) == report
    assert folders.everything_in(tmp_path) == before


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:  # a gradient overflows in the seventh step
            kwargs["model"].model.layers[0].mlp.up_proj.weight.grad.fill_(math.inf)

    monkeypatch.setattr(Watch, "on_pre_optimizer_step", poison)
    with pytest.raises(FloatingPointError, match="not finite"):
        train(model, output=tmp_path / "out", text=text, steps=20, **QUICK)
    assert not (tmp_path / "out").exists()
    checkpoints = sorted((tmp_path / "out.partial" / "checkpoints").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-6"]
    for path in checkpoints:
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "no setting 'learning_rat'; did you mean 'learning_rate'"),
        ("output_dir: here", "'output_dir' is not for this file to say, but for --output"),
        ("learning_rate: [", "is not YAML"),
        ("- 3", "does not hold settings by name"),
        ("lr_scheduler_type: zigzag", "Trainer's settings: .*zigzag"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size is at least 1, not 0"),
        ("eval_strategy: epoch", "needs validation data"),
        ("learning_rate: fast", "'learning_rate' is 'fast': expected number"),
        ("learning_rate:", "'learning_rate' is None: expected number"),
        ("max_steps: 2.5", r"'max_steps' is 2\.5: expected integer"),
        ("bf16: maybe", "'bf16' is 'maybe': expected switch"),
        ("max_steps: -5", "max_steps is at least 1, not -5"),
        ("num_train_epochs: 0", "num_train_epochs is above 0, not 0"),
        ("save_steps: 0", "save_steps is above 0, not 0"),
        ("optim: paged_adamw_8bit", "needs bitsandbytes, which is not installed: pip install bitsandbytes"),
        ("optim: adamw_torch_8bit", "needs torchao, which is not installed: pip install torchao"),
        ("lr_scheduler_type: cosine_with_min_lr", "min_lr"),
        ("dataloader_num_workers: -1", "num_workers"),
        ("adam_beta1: 2", "Invalid beta"),
        ("use_liger_kernel: true", "liger-kernel"),
        ("load_best_model_at_end: true", "requires the save and eval strategy to match"),
        ("metric_for_best_model: accuracy", "metric_for_best_model is one of loss"),
        ("deepspeed: ds.json", "settings.yaml': deepspeed: 'ds.json' is missing"),
        ("deepspeed: [3]", "deepspeed is a table"),
        (
            "deepspeed: {zero_optimization: {stage: 2}}",
            "deepspeed (needs|is for) (deepspeed|several)",
        ),
        ("fsdp: true", "fsdp only works in distributed training"),
        ("push_to_hub: true", "no 'push_to_hub' here: upload the output folder"),
        ("packing: true", "no 'packing' here"),
        ("max_length: 99999", "'max_length' is not for this file to say, but for --length"),
        ("report_to: clay-tablets", "'clay-tablets' is not installed"),
    ],
)
def test_mistakes_in_the_settings(
    content: str, message: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(content)
    before = folders.everything_in(tmp_path)

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("secateurs.training.run.load_model", load)
    if content.startswith("optim"):  # nor are data read
        monkeypatch.setattr("secateurs.training.run.packed_blocks", load)
    with pytest.raises(ValueError, match=message):
        train(model, output=tmp_path / "out", text=text, settings=settings, length=32, device="cpu")
    assert folders.everything_in(tmp_path) == before


def test_a_loss_is_known_at_the_end_however_seldom_it_is_logged(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("logging_steps: 1000\nsave_strategy: no\n")
    report = train(model, output=tmp_path / "out", text=text, steps=2, settings=file, **QUICK)
    assert math.isfinite(report.train_loss)


def test_epochs_asked_for_come_before_steps_in_the_file(model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("max_steps: 1\n")
    short = train(model, output=tmp_path / "short", text=text, settings=file, **QUICK)
    whole = train(model, output=tmp_path / "whole", text=text, settings=file, epochs=1, **QUICK)
    assert short.steps == 1
    assert whole.steps == math.ceil(len(TEXT) // 32 / 4)
    with pytest.raises(ValueError, match="give steps or epochs, not both"):
        train(model, output=tmp_path / "both", text=text, epochs=1, steps=1, **QUICK)


def test_what_was_left_at_the_last_moment_is_cleared(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()  # as a run leaves that was stopped before its first file
    train(model, output=tmp_path / "out", text=text, steps=2, **QUICK)
    partial.mkdir()  # and after its last step
    record = json.loads((tmp_path / "out" / "secateurs.json").read_text())
    (partial / "run.json").write_text(json.dumps({"run": record["run"]}))
    (partial / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    train(Path("model"), output=tmp_path / "out", text=text, steps=2, **QUICK)  # the same, spelled otherwise
    assert not partial.exists()


def test_settings_and_arguments_that_come_before_them(model: Path, text: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("learning_rate: 0.01\nmax_steps: 4\nweight_decay: 0.1\n")
    report = train(
        model, output=tmp_path / "out", text=text, steps=2, settings=settings, length=32, device="cpu"
    )
    assert report.steps == 2
    assert report.settings["trainer"]["learning_rate"] == 0.01
    assert report.settings["trainer"]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("learning_rate: 1e-4", 1e-4),
        ('learning_rate: "1e-4"', 1e-4),
        ("learning_rate: 1", 1.0),
        ("max_steps: 1e3", 1000),
        ('max_steps: "7"', 7),
        ("bf16: yes", True),
        ("bf16: off", False),
        ("save_strategy: no", "no"),
        ("save_strategy: 'no'", "no"),
        ("neftune_noise_alpha: 5", 5.0),
        ("save_total_limit: null", None),
        ("report_to: [tensorboard]", ["tensorboard"]),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", {"min_lr": 1e-6}),
    ],
)
def test_settings_as_people_write_them(content: str, expected: Any, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    [value] = read_settings(file, TrainingArguments).values()
    assert value == expected
    assert type(value) is type(expected)


def test_optimisers_of_other_packages_are_those_that_trainer_misses() -> None:
    """Against transformers itself: of all its optimisers those for which it asks for these two packages."""
    missed: dict[str, str] = {}
    for name in OptimizerNames:
        arguments = TrainingArguments(optim=name.value, use_cpu=True)
        try:
            Trainer.get_optimizer_cls_and_kwargs(arguments)
        except (ImportError, ValueError) as error:
            for package in ("torchao", "bitsandbytes"):
                if package in str(error):
                    missed[name.value] = package
    if importlib.util.find_spec("bitsandbytes") or importlib.util.find_spec("torchao"):
        assert missed.items() <= PACKAGES.items()
    else:
        assert missed == PACKAGES
