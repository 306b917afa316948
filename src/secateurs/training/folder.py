"""The folder a training run works in until its model is complete.

`OUTPUT.partial` holds the mark of the run and Trainer's checkpoints; its folder `model` becomes `OUTPUT` by
one rename when all of it is there.
"""

import errno
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainingArguments

from secateurs.checkpoint import RECORD, Checkpoint, read_json, write_json
from secateurs.checkpoint.card import write_card
from secateurs.checkpoint.output import is_free, partial_of, run_of, taken, unfinished
from secateurs.training.report import TrainerReport, TrainingReport

CLOCK = "secateurs.json"
"""The last file that is written into a checkpoint, with the time it took to get there: one without it was cut
off."""

STATELESS = ("adafactor", "sgd")
"""Optimisers that keep next to nothing of each weight; of the others it is taken to be two numbers."""


class TrainingFolder:
    """Where a run's checkpoints gather.

    Args:
        output: the folder that the run is to make.
        identity: all that decides the resulting folder.
        run: what stands for that, where the run is a part of another.
    """

    def __init__(self, output: Path, identity: dict[str, Any], run: str | None = None) -> None:
        # Through links: the last step is a rename, which would replace or trip over a link itself.
        self.output = output.resolve()
        self.partial = partial_of(self.output)
        self.model, self.checkpoints = self.partial / "model", self.partial / "checkpoints"
        self.mark = self.partial / "run.json"
        self.text = self.partial / "text"
        self.run = run or run_of(identity)

    def finished(self) -> bool:
        """Whether the output is there already, made by this same run. Writes nothing.

        Raises:
            ValueError: the output folder, or an unfinished one, holds something else than this run's work.
        """
        if not is_free(self.output):
            record = self.output / RECORD
            if not record.is_file() or read_json(record).get("run") != self.run:
                raise taken(self.output)
            return True
        empty = {self.mark.with_name(self.mark.name + ".tmp")}  # all that stands before the mark
        ours = not self.partial.exists() or (
            self.partial.is_dir() and empty.issuperset(self.partial.iterdir())
        )
        if not ours and not self._is_marked():
            raise unfinished(self.partial, "settings, data, model, versions or another number of processes")
        return False

    def _is_marked(self) -> bool:
        """Whether this run's mark is in the folder that it works in."""
        return self.mark.is_file() and read_json(self.mark).get("run") == self.run

    def clear(self) -> None:
        """Delete what a run left that was stopped between its last two steps."""
        if self._is_marked():
            shutil.rmtree(self.partial, ignore_errors=True)

    def check_room(self, needed_bytes: int) -> None:
        """Raises OSError if the disk has too little for what a run keeps at once."""
        held = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        parent = next(folder for folder in self.output.parents if folder.exists())
        free, needed = shutil.disk_usage(parent).free, needed_bytes - held
        if free < needed:
            raise OSError(
                f"checkpoints and the output need {needed / 1e9:.2f} GB, the disk of '{parent}' has "
                f"{free / 1e9:.2f} GB free: make room, or say save_total_limit: 1 or save_strategy: no in "
                "--settings"
            )

    def begin(self) -> None:
        """Mark the working folder as this run's, and clear it of what was cut off."""
        self.partial.mkdir(parents=True, exist_ok=True)
        write_json(self.mark, {"run": self.run})
        shutil.rmtree(self.model, ignore_errors=True)
        self._clear_cut_off()

    def _clear_cut_off(self) -> None:
        for path in self.checkpoints.glob("checkpoint-*"):
            if not (path / CLOCK).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if (path / CLOCK).is_file()]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Turns what fails while checkpoints are written, in whatever words, into one OSError."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = _of_disk(error)
            if reason is None:
                raise
            self._clear_cut_off()
            last = self.last_checkpoint()
            whole = f"goes on from '{last.name}'" if last else "starts again"
            raise OSError(
                f"cannot write a checkpoint in '{self.checkpoints}' ({reason}): make room, then the same "
                f"command {whole}"
            ) from error

    def finish(
        self, record: dict[str, Any], checkpoint: Checkpoint, kind: type[TrainerReport] = TrainingReport
    ) -> None:
        """Turn `model`, which is complete but for its record and its card, into the output."""
        write_json(self.model / RECORD, {"run": self.run, **record})
        report = kind.read(self.model)
        write_card(
            self.model,
            checkpoint.folder,
            report.settings["model"],
            title=kind.title,
            facts=report.facts,
            usage="",
            tags=kind.tags,
        )
        os.replace(self.model, self.output)
        shutil.rmtree(self.partial, ignore_errors=True)

    def amend(self, entries: dict[str, Any]) -> None:
        """Write entries into the record of the output."""
        write_json(self.output / RECORD, {**read_json(self.output / RECORD), **entries})


def _of_disk(error: Exception) -> str | None:
    """What a disk that could not be written to said, if that is what went wrong."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return error.strerror or text if error.errno in full else None
    if isinstance(error, SafetensorError):
        return text if "os error" in text else None
    # torch.save's; of its own words only the file's name would be of use.
    return "writing failed" if "PytorchStreamWriter" in text or "inline_container" in text else None


def steps_in_all(arguments: TrainingArguments, rows: int) -> int:
    """Optimiser steps that Trainer makes of so many sequences."""
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps >= 1:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * math.ceil(rows / batch))


def bytes_at_once(
    checkpoint: Checkpoint, arguments: TrainingArguments, *, rows: int, lora: int | None, masks: bool = False
) -> int:
    """The most that checkpoints take on the disk at one time.

    Args:
        checkpoint: the model.
        arguments: Trainer's.
        rows: sequences to train on.
        lora: the rank of adapters, if those are what is trained.
        masks: whether masks are in them, a bit for each weight.
    """
    if arguments.save_strategy == "no":
        return 0
    shapes = checkpoint.shapes.values()
    weights = trained = sum(math.prod(shape) for shape in shapes)
    if lora is not None:
        trained = sum(lora * sum(shape) for shape in shapes if len(shape) == 2)
    states = 0 if arguments.optim in STATELESS else 2
    steps = steps_in_all(arguments, rows)
    every = arguments.save_steps if arguments.save_steps >= 1 else math.ceil(arguments.save_steps * steps)
    saved = math.ceil(arguments.num_train_epochs) if arguments.save_strategy == "epoch" else steps / every
    # The oldest is deleted once the newest is there.
    count = min(math.ceil(saved), (arguments.save_total_limit or math.inf) + 1)
    # Beside Trainer's own file accelerate saves sharded weights, and DeepSpeed its copy in float32 too.
    copies = 1 + states + bool(arguments.fsdp) + 2 * bool(arguments.deepspeed)
    return int(count) * (4 * trained * copies + (weights // 8 if masks else 0))
