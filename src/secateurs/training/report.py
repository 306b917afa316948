"""What a training run did, in Python and as `secateurs.json` in the output folder."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from secateurs.checkpoint import RECORD, read_json
from secateurs.training.units import NAMES, Kind


class TrainerReport(ABC):
    """What a run of Trainer did, as far as a model card says it."""

    title: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]
    settings: dict[str, Any]

    @property
    @abstractmethod
    def facts(self) -> list[tuple[str, str]]:
        """Names and values."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path) -> "TrainerReport":
        """The report in a folder."""


@dataclass(frozen=True)
class TrainingReport(TrainerReport):
    """What a training run did."""

    title: ClassVar = "trained"
    tags: ClassVar = ("trained",)

    output: Path
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    """Spent on training steps, without loading, validation and saving, over all sessions of a resumed run."""
    steps: int
    tokens: int
    """Fed to the model, without padding."""
    peak_memory_bytes: int
    """Of the process, or of the GPU's tensors."""
    flops: float | None
    """Of the forward and backward passes, probes included; None without sparse steps."""
    dense_flops: float | None
    """What plain training would have taken for the same tokens."""
    train_loss: float
    """Mean over the last tenth of the steps."""
    validation_loss: float | None
    validation: dict[str, str] | None = None
    """Where the data for it came from, and its SHA-256."""
    rates: dict[Kind, list[float | None]] | None = None
    """By kind of unit the highest omission rate of each block, where these were measured."""
    whole: str | None = None
    """What cannot be cut and ran whole all the time."""
    unpadded: bool = False
    """Whether the padding of batches was left out."""
    pruning: dict[str, Any] | None = None
    """How the model was pruned on the way: pattern, schedule, and `sparsity`, of each matrix by name."""
    history: list[dict[str, float]] | None = None
    """What was logged on the way, see `secateurs.training.loop.history`; older records have none."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What a model card says of the run."""
        settings = self.settings
        omission = (
            "up to half of what can be left out, by measured rates"
            if settings["omission"] == "auto"
            else f"up to {settings['omission']:.0%} of heads and channels"
        )
        facts = [
            ("Trained on", Path(settings["text"] or settings["chat"]).name),
            ("Steps", f"{self.steps}, {self.tokens} tokens"),
            ("Omission", f"{omission} ({settings['schedule']})"),
            ("Training loss", f"{self.train_loss:.4f}"),
        ]
        if settings.get("context") == "read":
            facts.insert(3, ("Context", "only read"))
        if self.pruning:
            facts.append(("Pruned", f"to {self.pruning['pattern']} by step {self.pruning['end']}"))
        if settings["lora"]:
            facts.append(("LoRA", f"rank {settings['lora']}, merged"))
        if self.validation_loss is not None:
            facts.append(("Validation loss", f"{self.validation_loss:.4f}"))
        return [*facts, ("secateurs", self.versions["secateurs"])]

    @classmethod
    def read(cls, folder: Path) -> "TrainingReport":
        """The report of a trained model's folder; ValueError if it has none."""
        content = read_json(folder / RECORD)
        names = {field.name for field in dataclasses.fields(cls)} - {"output"}
        later = {"validation", "rates", "whole", "unpadded", "pruning", "history"}
        if not names - later <= content.keys():
            raise ValueError(f"'{folder / RECORD}' is not the record of a training run")
        return cls(output=folder, **{name: content[name] for name in names & content.keys()})

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.steps} steps, {self.tokens} tokens in {self.seconds:.1f} s, "
            f"{self.tokens_per_second:.0f} tokens per second, "
            f"peak memory {self.peak_memory_bytes / 1e6:.0f} MB"
        ]
        if self.flops is not None and self.dense_flops:
            share = self.flops / self.dense_flops
            lines.append(f"FLOPs: {self.flops:.3g}, {share:.1%} of what dense steps take")
        for kind, rates in (self.rates or {}).items():
            shown = ", ".join("-" if rate is None else f"{rate:.0%}" for rate in rates)
            lines.append(f"highest omission of {NAMES[kind]} by block: {shown}")
        if self.whole:
            lines.append(self.whole)
        if self.pruning:
            shares = self.pruning["sparsity"].values()
            lines.append(
                f"pruned to {self.pruning['pattern']} by step {self.pruning['end']}: "
                f"{min(shares):.1%} to {max(shares):.1%} zeros in a matrix"
            )
        losses = f"train loss {self.train_loss:.4f}"
        if self.validation_loss is not None:
            losses += f", validation loss {self.validation_loss:.4f}"
            losses += f" on {self.validation['data']}" if self.validation else ""
        return "\n".join([*lines, losses])
