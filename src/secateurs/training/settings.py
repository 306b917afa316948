"""What `train` can be told."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateurs.checkpoint.shards import size_in_bytes
from secateurs.settings import OfText
from secateurs.training.adaptive import AdaptivePruning
from secateurs.training.callback import Importance, Select, SparsityAcceleratedTraining

ScheduleName = Literal["ladder", "constant", "linear", "cubic"]
Context = Literal["learn", "read"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings(OfText):
    """Train a pretrained model on text or conversations, skipping what matters least at the moment.

    Steps run on a part of the heads and channels, and at the end of training on all of them. A pruned model
    keeps its zeros; a dense one can be pruned on the way. Interrupt it whenever you like: the same command
    continues from the last checkpoint.

    Example: secateurs train my-llama --text papers/ --validation held-out.txt --output my-llama-papers

    Example: secateurs train my-llama --chat questions.jsonl --epochs 2 --output my-llama-chat
    """

    output: str | Path
    """The folder to make. It must not exist, unless this same command began it."""

    text: str | Path | None = None
    """What to pre-train on: a file, a folder or a dataset's name (docs/text.md)."""

    chat: str | Path | None = None
    """What to fine-tune on instead: conversations (docs/text.md). The loss is that of the answers only."""

    validation: str | Path | None = None
    """The same kind of data, for the loss on text that was not trained on. Once the output is there, the same
    command with other data measures it on those."""

    omission: float | Literal["auto"] = 0.5
    """Highest share of heads and channels that a step skips, in [0, 1). 0 is plain training; auto skips half
    of all that can be skipped, most of it where the first batch shows that it matters least."""

    importance: Importance = "weighted"
    """What decides which."""

    context: Context = "learn"
    """What steps do with what stands before the first answer of a conversation: learn from how it is made use
    of, as plain training does, or only read it, which takes less time where that is long."""

    select: Select = "topk"
    """The most important ones, or a sample in proportion to importance."""

    schedule: ScheduleName = "ladder"
    """How the share goes from the highest to 0; constant never does."""

    prune_to: str | None = None
    """Prune while training, by what the task shows, to this pattern: 70%, 2:4. By default nothing is pruned,
    and a pruned model keeps its zeros."""

    prune_end: float = 0.6
    """The share of the steps in which that is done, warm-up included. The others train what is left."""

    epochs: float | None = None
    """Passes over the data. By default one."""

    steps: int | None = None
    """Optimiser steps, instead of epochs."""

    batch_size: int | None = None
    """Sequences on each device at once. By default 8."""

    accumulation: int | None = None
    """Batches to an optimiser step. By default 1."""

    learning_rate: float | None = None
    """Its peak. By default 5e-5, with LoRA 2e-4."""

    warmup: float | None = None
    """Steps until then, or below 1 their share of all steps. By default 0.03."""

    length: int | None = None
    """Tokens in a block of text, or at most in a conversation (a longer one is cut). By default as many as
    the model was made for, at most 2048."""

    lora: int | None = None
    """Train adapters of this rank, which are merged into the weights at the end."""

    seed: int | None = None
    """Of the order of the data and of all else that is random. By default 0."""

    settings: str | Path | None = None
    """A YAML file with any of Trainer's settings (`transformers.TrainingArguments`, for conversations TRL's
    `SFTConfig`); the options here come before it."""

    report_to: tuple[str, ...] = ()
    """Loggers that Trainer knows: tensorboard, wandb, mlflow..."""

    device: str | None = None
    """cpu or cuda. By default a GPU if there is one."""

    max_shard_size: str | int = "5GB"
    """The largest a file of weights may be: 500MB, 5GB, or a number of bytes."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit, alone or together."""
        if (self.text is None) == (self.chat is None):
            raise ValueError("give either text to pre-train on or chat to fine-tune on")
        if self.chat is not None and self.field != "text":
            raise ValueError("field goes with text: conversations are found by their own fields")
        if self.context == "read" and self.chat is None:
            raise ValueError("context goes with chat: a text has nothing before its first label")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.lora is not None:
            needs("peft")
            if self.lora < 1:
                raise ValueError(f"the rank of LoRA is at least 1, not {self.lora}")
        if self.chat is not None:
            needs("trl")
        size_in_bytes(self.max_shard_size)
        self.callback(seed=0)
        if not 0 < self.prune_end < 1:
            raise ValueError(f"prune_end is a share of the steps, above 0 and below 1, not {self.prune_end}")
        self.pruning(start=0)

    def pruning(self, *, start: float) -> AdaptivePruning | None:
        """Pruning as it is asked for; ValueError for a setting that is none of its."""
        return (
            None if self.prune_to is None else AdaptivePruning(self.prune_to, start=start, end=self.prune_end)
        )

    def callback(self, *, seed: int) -> SparsityAcceleratedTraining:
        """Sparse steps as they are asked for; ValueError for a setting that is none of theirs."""
        return SparsityAcceleratedTraining(
            self.omission,
            schedule=self.schedule,
            importance=self.importance,
            select=self.select,
            seed=seed,
        )

    @property
    def trainer(self) -> dict[str, Any]:
        """What is given here of Trainer's settings, by their names there."""
        named = {
            "num_train_epochs": self.epochs,
            "max_steps": -1 if self.epochs is not None else self.steps,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup,
            "seed": self.seed,
            "report_to": list(self.report_to) or None,
        }
        return {name: value for name, value in named.items() if value is not None}


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"this needs {package}, which is not installed: pip install 'secateurs[train]'")
