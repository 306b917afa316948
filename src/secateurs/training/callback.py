"""The Trainer callback: all that a user of `transformers.Trainer`, or of TRL's trainers, adds."""

import base64
from collections.abc import Collection
from typing import Any, Literal, cast

import safetensors.torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from secateurs.training.importance import Importance
from secateurs.training.ladder import Schedule
from secateurs.training.selection import Select
from secateurs.training.sparse import PROBE_EVERY, SparseTraining


class SparsityAcceleratedTraining(TrainerCallback, ExportableState):
    """Sparsity-Accelerated Training for `transformers.Trainer` and everything built on it.

    Checkpoints are those of plain training, with what a resumed run needs in `trainer_state.json`. Training
    leaves the plain, dense model. What is logged with each loss also has `SparseTraining.figures`.

    Example:
        Trainer(model, args, train_dataset=data, callbacks=[SparsityAcceleratedTraining(rate=0.5)]).train()

    Trainer asks its loggers (TensorBoard, wandb...) before callbacks that it is given, so they do not see
    these figures. They do where the callback comes first:

        trainer = Trainer(model, args, train_dataset=data)
        trainer.callback_handler.callbacks.insert(0, SparsityAcceleratedTraining(rate=0.5))

    Args:
        rate: highest share of heads and channels that a step omits, in [0, 1); 0.5 if left out. "auto" omits
            that share (or the schedule's peak) of the blocks' multiplications, spread over blocks, heads and
            channels by what the first batch shows (see `secateurs.training.rates`).
        schedule: "ladder" (LORS), "constant", "linear", "cubic", or a schedule, which brings its own rate.
        importance: "activation", "weighted", "taylor", "fisher", "magnitude" or "uniform" (see
            `secateurs.training.importance.measure`).
        select: "topk", or "sample" without replacement in proportion to importance.
        attention_rate: the highest rate of the heads, if not `rate`.
        mlp_rate: the highest rate of the channels, if not `rate`.
        exempt: indices of blocks that always run whole; negative ones count from the end.
        probe_every: optimiser steps between two measurements of importance, each followed by a new choice.
        across_layers: let layers share the budget of each kind by importance; otherwise each keeps as much.
        seed: of the sampling.

    Raises:
        ValueError: a setting is unknown or out of its range.
    """

    def __init__(
        self,
        rate: float | Literal["auto"] | None = None,
        *,
        schedule: str | Schedule = "ladder",
        importance: Importance = "weighted",
        select: Select = "topk",
        attention_rate: float | None = None,
        mlp_rate: float | None = None,
        exempt: Collection[int] = (),
        probe_every: int = PROBE_EVERY,
        across_layers: bool = False,
        seed: int = 0,
    ) -> None:
        settings: dict[str, Any] = {
            "rate": rate,
            "schedule": schedule,
            "importance": importance,
            "select": select,
            "attention_rate": attention_rate,
            "mlp_rate": mlp_rate,
            "exempt": list(exempt),
            "probe_every": probe_every,
            "across_layers": across_layers,
            "seed": seed,
        }
        self.training = SparseTraining(**settings)
        """The run's state: what progress bars and summaries read."""
        self._told: dict[str, float] = {}
        self._settings = settings | {"schedule": schedule if isinstance(schedule, str) else repr(schedule)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to what is about to be trained."""
        if args.n_gpu > 1:
            raise ValueError(
                "DataParallel copies the model in each step: start training with torchrun, for DDP"
            )
        self.training.attach(kwargs["model"], kwargs["optimizer"], state.max_steps)
        name = type(self).__name__
        states = cast(dict[str, Any], state.stateful_callbacks)
        encoded = states.get(name, {}).get("attributes", {}).get("encoded")
        if state.global_step and encoded:
            self.training.load_state_dict(safetensors.torch.load(base64.b64decode(encoded)))
        elif state.global_step:  # plain training so far: go on from there
            self.training.step_number = state.global_step
        states[name] = self.state()  # without an entry Trainer fails to save a run that it resumed

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell that an optimiser step is done."""
        self.training.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write beside a step's loss how sparse the step was; of the blocks only what has changed."""
        if not logs or "loss" not in logs:
            return
        shares = self.training.shares_kept
        changed = {name: share for name, share in shares.items() if self._told.get(name) != share}
        self._told = shares
        for entry in (logs, state.log_history[-1]):  # callbacks after this one are given `logs`
            entry.update(self.training.figures | changed)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the plain model."""
        self.training.detach()

    def state(self) -> dict[str, Any]:
        """What Trainer saves in a checkpoint's `trainer_state.json`: tensors as base64 of safetensors."""
        attributes = {}
        if self.training.attached:  # Trainer also asks before training
            state = safetensors.torch.save(self.training.state_dict())
            attributes["encoded"] = base64.b64encode(state).decode()
        return {"args": self._settings, "attributes": attributes}
