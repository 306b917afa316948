"""The callback in Trainer and SFTTrainer: all that a user adds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_omission import loss_of, silence
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from families import build, tokens
from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.ladder import Constant
from secateurs.training.sparse import SparseTraining

STEPS = 10
BATCH = 2
SETTINGS: dict[str, Any] = {"rate": 0.5, "probe_every": 3, "select": "sample"}


def trainer(
    model: Any, folder: Path, *callbacks: TrainerCallback, batches: int = STEPS, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-2,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            **settings,
        }
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(BATCH).repeat(batches, 1)]
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=list(callbacks))


def losses_of(run: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


def up_shape(model: nn.Module) -> tuple[int, ...]:
    return tuple(model.get_submodule("model.layers.0.mlp.up_proj").weight.shape)


class Shapes(TrainerCallback):
    """Notes the size of an MLP after each step."""

    def __init__(self) -> None:
        self.channels: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.channels.append(up_shape(kwargs["model"])[0])


def test_one_callback_is_all_that_a_user_adds(tmp_path: Path) -> None:
    model, shapes = build("llama"), Shapes()
    sat = SparsityAcceleratedTraining(rate=0.5)
    run = trainer(model, tmp_path, shapes, sat, gradient_accumulation_steps=2, batches=2 * STEPS)
    run.train()
    assert shapes.channels == [40] * 4 + [48, 64, 72] + [80] * 3  # in multiples of 8
    assert up_shape(model) == (80, 48)
    rates = [entry["omission_rate"] for entry in run.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.5] * 4 + [0.375, 0.25, 0.125] + [0] * 3)
    losses = losses_of(run)
    assert losses[STEPS] < losses[1]
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("stop", [4, 7])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    def run(folder: Path, **settings: Any) -> Trainer:
        sat = SparsityAcceleratedTraining(**SETTINGS)
        return trainer(build("gpt2"), folder, sat, save_strategy="steps", save_steps=stop, **settings)

    uninterrupted = run(tmp_path / "a")
    uninterrupted.train()
    expected = losses_of(uninterrupted)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop + 1

    first = run(tmp_path / "b")
    first.add_callback(Interrupt())
    first.train()
    checkpoint = tmp_path / "b" / f"checkpoint-{stop}"
    second = run(tmp_path / "b")
    second.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(second) == expected
    for here, there in zip(uninterrupted.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(here, there)


def test_a_plain_checkpoint_can_be_resumed_sparsely(tmp_path: Path) -> None:
    trainer(build("llama"), tmp_path, save_strategy="steps", save_steps=5).train()
    shapes = Shapes()
    callbacks = (shapes, SparsityAcceleratedTraining(0.5, schedule="constant"))
    run = trainer(build("llama"), tmp_path, *callbacks, save_strategy="steps", save_steps=5)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert shapes.channels == [40] * 5
    assert sorted(losses_of(run)) == list(range(1, STEPS + 1))


def test_evaluation_and_the_best_checkpoint_are_of_the_whole_model(tmp_path: Path) -> None:
    model = build("llama")
    run = trainer(
        model,
        tmp_path,
        SparsityAcceleratedTraining(0.5, schedule="constant"),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=5,
        save_steps=5,
        load_best_model_at_end=True,
    )
    run.train()
    best = min(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)
    reloaded = type(model).from_pretrained(run.state.best_model_checkpoint)
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"bf16": True}, {"max_grad_norm": 0.01}]
)
def test_trainers_own_ways_of_training(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = trainer(build("llama"), tmp_path, SparsityAcceleratedTraining(**SETTINGS), **settings)
    run.train()
    losses = losses_of(run)
    assert losses[STEPS] < losses[1]


def test_clipping_sees_the_norm_of_what_runs(tmp_path: Path) -> None:
    run = trainer(
        build("llama", torch.float64), tmp_path, SparsityAcceleratedTraining(**SETTINGS), max_steps=3
    )
    norms: list[float] = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    run.add_callback(Norm())
    run.train()
    assert all(norm <= 1 + 1e-6 for norm in norms)
    assert max(norms) == pytest.approx(1, abs=1e-5)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    model = build("llama")

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                kwargs["model"].lm_head.register_forward_hook(lambda m, a, out: out * float("inf"))

    run = trainer(
        model, tmp_path, Poison(), SparsityAcceleratedTraining(0.5), save_strategy="steps", save_steps=5
    )
    with pytest.raises(FloatingPointError, match="not finite at step 6"):
        run.train()
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["global_step"] == 5
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_schedule_must_fit_the_training(tmp_path: Path) -> None:
    run = trainer(build("llama"), tmp_path, SparsityAcceleratedTraining(schedule=Constant(0.5, STEPS + 1)))
    with pytest.raises(ValueError, match="spans 11 steps, training makes 10"):
        run.train()


def lora(model: PreTrainedModel, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(model, config)


def test_dora_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(lora(build("llama"), use_dora=True), tmp_path, SparsityAcceleratedTraining(0.5))
    with pytest.raises(ValueError, match="only plain LoRA is supported: leave out DoRA"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_with_lora_base_and_adapters_are_sliced_alike(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = lora(build(name, torch.float64))
    sat = SparsityAcceleratedTraining(0.5, schedule="constant")
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    run = trainer(model, tmp_path, sat, batches=4)
    small: list[int] = []

    class Small(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pieces = sat.training.omission.slices
            small.append(sum(p.parameter.shape[p.dim] < len(p.unit) for p in pieces))

    run.add_callback(Small())
    run.train()
    # Base weight and near adapter of every layer, and biases; of grouped queries keys and values stay whole.
    pieces = sat.training.omission.slices
    assert small == [sum(int((p.unit >= 0).any()) for p in pieces)] * 4
    assert all(torch.equal(value, dict(model.named_parameters())[n]) for n, value in base.items())
    losses = losses_of(run)
    assert losses[4] < losses[1]


def test_lora_equals_training_the_dense_model_with_neurons_silenced() -> None:
    torch.manual_seed(0)
    model = lora(build("llama", torch.float64)).train()
    sat = SparseTraining(0.5, schedule="constant")
    sat.attach(model, AdamW(p for p in model.parameters() if p.requires_grad), total_steps=1)
    loss = loss_of(model)
    loss.backward()
    kept = sat.kept
    sat.detach()  # the gradients become whole with the parameters
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    silence(model.get_base_model(), kept)
    expected = loss_of(model)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert len(gradients) == 2 * 7 * 3
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_two_accumulated_batches_are_one_twice_as_large(tmp_path: Path, rate: float) -> None:
    """Their numbers of labels differ: the loss is the mean over both. The rate counts steps."""

    def train(**settings: Any) -> tuple[PreTrainedModel, list[int]]:
        model, shapes = build("llama", torch.float64), Shapes()
        sat = SparsityAcceleratedTraining(rate, importance="magnitude", probe_every=2)
        run = trainer(model, tmp_path, shapes, sat, optim="sgd", batches=2 * STEPS, **settings)
        for row in run.train_dataset[1::4]:
            row["labels"] = row["labels"].clone()
            row["labels"][:-3] = -100
        run.args.data_seed = run.args.seed = 0
        run.train()
        assert run.state.global_step == STEPS
        return model, shapes.channels

    one, channels = train(per_device_train_batch_size=2 * BATCH)
    two, same = train(gradient_accumulation_steps=2)
    assert channels == same == ([80] * STEPS if rate == 0 else [40] * 4 + [48, 64, 72] + [80] * 3)
    for name, weight in two.named_parameters():
        torch.testing.assert_close(weight, one.get_parameter(name), rtol=1e-5, atol=1e-7, msg=name)


def test_sft_trainer(tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    model, shapes = build("llama"), Shapes()
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(BATCH).repeat(STEPS, 1)]
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    run = trl.SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[shapes, SparsityAcceleratedTraining(0.5)],
    )
    run.train()
    assert shapes.channels == [40] * 4 + [48, 64, 72] + [80] * 3  # in multiples of 8
    losses = losses_of(run)
    assert losses[STEPS] < losses[1]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
