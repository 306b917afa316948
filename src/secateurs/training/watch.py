"""The callback that keeps a run's time, shows its progress, and stops it when its loss is not finite."""

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from secateurs.checkpoint import read_json, write_json
from secateurs.training.adaptive import AdaptivePruning
from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.folder import CLOCK


class Over(Exception):  # noqa: N818 - nothing is wrong
    """All steps were made when a run was resumed: Trainer would make one more."""


class Watch(TrainerCallback):
    """Keeps the time and shows the progress; stops a run whose loss is not finite before that is saved.

    Args:
        sparse: whose omission rate is shown.
        pruning: whose share of zeros is.
        keep: how many checkpoints. Trainer itself must keep all: it deletes one for a newer one that is not
            marked as whole yet.
        shown: whether there is a progress bar.
    """

    def __init__(
        self,
        sparse: SparsityAcceleratedTraining | None,
        pruning: AdaptivePruning | None = None,
        *,
        keep: int | None,
        shown: bool,
    ) -> None:
        self.sparse, self.pruning, self.keep = sparse, pruning, keep
        self.seconds = 0.0
        self.start = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self.task = self.bar.add_task("training", state="")
        self.loss = ""

    def resume(self, checkpoint: Path) -> None:
        """Go on from the time that a checkpoint had taken."""
        self.seconds = read_json(checkpoint / CLOCK)["seconds"]

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar.start()
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.tokens, self.before = state.num_input_tokens_seen, self.seconds
        self.start = time.monotonic()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise Over

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = time.monotonic()
        self.seconds, self.start = self.seconds + now - self.start, now
        pace = (state.num_input_tokens_seen - self.tokens) / (self.seconds - self.before)
        rate = f"omits {self.sparse.training.rate:.0%}, " if self.sparse else ""
        rate += f"{self.pruning.sparsity:.0%} zeros, " if self.pruning else ""
        self.bar.update(
            self.task, completed=state.global_step, state=f"{rate}{pace:,.0f} tokens/s{self.loss}"
        )
        # Neither a checkpoint nor the end may be of a step whose loss nobody has looked at.
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log |= control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, what in (("loss", "loss"), ("grad_norm", "gradient")):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise FloatingPointError(
                    f"the {what} is not finite at step {state.global_step}: try a smaller learning rate; the "
                    f"checkpoints before it stay in '{args.output_dir}'"
                )
        passed = {"seconds": round(self.seconds, 3), "tokens": state.num_input_tokens_seen}
        state.log_history[-1].update(passed)
        if logs and "loss" in logs:
            self.loss = f", loss {logs['loss']:.4f}"

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            write_json(folder / f"checkpoint-{state.global_step}" / CLOCK, {"seconds": self.seconds})
            rotate_checkpoints(str(folder), self.keep, state.best_model_checkpoint)
        self.start = time.monotonic()
