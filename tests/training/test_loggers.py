"""What loggers are told of sparse training, read from the files that they write."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_callback import trainer
from transformers import TrainerCallback

import folders
from families import build
from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.run import train

STEPS = 10
RATES = [0.5] * 4 + [0.375, 0.25, 0.125] + [0] * 3
CHANNELS = {1: 40 / 80, 5: 48 / 80, 6: 64 / 80, 7: 72 / 80, 8: 1.0}
"""By the step from which on it is so."""


class Logger(TrainerCallback):
    """Notes what it is given, as Trainer's own loggers do."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs.append({**logs, "step": state.global_step})


def check(logs: list[dict[str, Any]], flops: float, dense: float) -> None:
    assert [entry["omission_rate"] for entry in logs] == pytest.approx(RATES)
    channels = {entry["step"]: entry["channels_kept/1"] for entry in logs if "channels_kept/1" in entry}
    assert channels == pytest.approx(CHANNELS)
    assert logs[-1]["flops_saved"] == pytest.approx(1 - flops / dense)
    assert logs[-1]["speedup_by_flops"] == pytest.approx(dense / flops)


def test_callbacks_behind_it_and_the_history_have_its_figures(tmp_path: Path) -> None:
    """Put first, it comes before loggers that Trainer itself has made."""
    logger = Logger()
    run = trainer(build("llama"), tmp_path, logger)
    sat = SparsityAcceleratedTraining(0.5)
    run.callback_handler.callbacks.insert(0, sat)
    run.train()
    check(logger.logs, sat.training.flops_done, sat.training.flops_dense)
    assert [entry for entry in run.state.log_history if "loss" in entry] == logger.logs


def test_put_first_it_resumes(tmp_path: Path) -> None:
    def run() -> Any:
        made = trainer(build("llama"), tmp_path, save_strategy="steps", save_steps=4)
        made.callback_handler.callbacks.insert(0, SparsityAcceleratedTraining(0.5))
        return made

    run().train()
    again = run()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    rates = [entry["omission_rate"] for entry in again.state.log_history if "loss" in entry]
    assert rates == pytest.approx(RATES)


def test_tensorboard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, whose loggers Trainer makes."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    report = _train(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    names = {tag for tag in events.Tags()["scalars"] if tag.startswith("train/")}
    by_step: dict[int, dict[str, Any]] = {step: {"step": step} for step in range(1, STEPS + 1)}
    for name in names - {"train/train_loss"}:
        for scalar in events.Scalars(name):
            by_step[scalar.step][name.removeprefix("train/")] = scalar.value
    logs = [entry for entry in by_step.values() if "loss" in entry]
    assert report.flops is not None
    assert report.dense_flops is not None
    check(logs, report.flops, report.dense_flops)
    assert logs[-1]["sparsity"] == pytest.approx(0.3, abs=0.01)


def test_wandb_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        report = _train(tmp_path, "wandb")
        summary = json.loads(json.dumps(dict(wandb.run.summary)))
    finally:
        wandb.finish()
    assert report.flops is not None
    assert report.dense_flops is not None
    assert summary["train/flops_saved"] == pytest.approx(1 - report.flops / report.dense_flops)
    assert summary["train/channels_kept/1"] == 1


def _train(folder: Path, logger: str) -> Any:
    (folder / "text.txt").write_text("It was a cold evening, and nobody had lit a fire. " * 60)
    (folder / "settings.yaml").write_text("logging_steps: 1\n")
    return train(
        folders.save(folder / "model", "llama"),
        output=folder / "out",
        text=folder / "text.txt",
        settings=folder / "settings.yaml",
        report_to=(logger,),
        prune_to="30%",
        length=32,
        batch_size=4,
        steps=STEPS,
        device="cpu",
    )
