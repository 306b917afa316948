"""Training a model folder: what comes out, and that an interrupted run ends like one that was not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import folders
from secateurs import perplexity, prune
from secateurs.training.data import CHAT_TEMPLATE, packed_blocks
from secateurs.training.report import TrainingReport
from secateurs.training.run import train
from secateurs.training.watch import Watch

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
        "lr_scheduler_type: constant\nmax_grad_norm: 0\ntrain_sampling_strategy: sequential\n"
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
        ("report_to: clay-tablets", "'clay-tablets' is not installed"),
    ],
)
def test_mistakes_in_the_settings(
    content: str, message: str, model: Path, text: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(content)
    before = folders.everything_in(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(model, output=tmp_path / "out", text=text, settings=settings, length=32, device="cpu")
    assert folders.everything_in(tmp_path) == before


def test_settings_and_arguments_that_come_before_them(model: Path, text: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("learning_rate: 0.01\nmax_steps: 4\nweight_decay: 0.1\n")
    report = train(
        model, output=tmp_path / "out", text=text, steps=2, settings=settings, length=32, device="cpu"
    )
    assert report.steps == 2
    assert report.settings["trainer"]["learning_rate"] == 0.01
    assert report.settings["trainer"]["weight_decay"] == 0.1
