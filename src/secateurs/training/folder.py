"""The folder a training run works in until its model is complete.

`OUTPUT.partial` holds the mark of the run and Trainer's checkpoints; its folder `model` becomes `OUTPUT` by
one rename when all of it is there.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from secateurs.checkpoint import read_json, write_json
from secateurs.pruning.record import RECORD

# The last file that Trainer writes into a checkpoint: one without it was cut off.
STATE = "trainer_state.json"


class TrainingFolder:
    """Where a run's checkpoints gather.

    Args:
        output: the folder that the run is to make.
        identity: all that decides the resulting weights.
    """

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        # Through links: the last step is a rename, which would replace or trip over a link itself.
        self.output = output.resolve()
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.model, self.checkpoints = self.partial / "model", self.partial / "checkpoints"
        self.run = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def finished(self) -> bool:
        """Whether the output is there already, made by this same run. Writes nothing.

        Raises:
            ValueError: the output folder, or an unfinished one, holds something else than this run's work.
        """
        if self.output.is_mount():
            raise ValueError(
                f"'{self.output}' is a mount point, which cannot be made in one step: give a folder in it"
            )
        if self.output.exists() and not (self.output.is_dir() and not any(self.output.iterdir())):
            record = self.output / RECORD
            if not record.is_file() or read_json(record).get("run") != self.run:
                raise ValueError(f"'{self.output}' exists and is not this run's: give another output folder")
            return True
        mark = self.partial / "run.json"
        if self.partial.exists() and (not mark.is_file() or read_json(mark).get("run") != self.run):
            raise ValueError(
                f"'{self.partial}' holds an unfinished run with other settings, model or versions: "
                "delete it or give another output folder"
            )
        return False

    def begin(self) -> None:
        """Mark the working folder as this run's."""
        self.partial.mkdir(parents=True, exist_ok=True)
        write_json(self.partial / "run.json", {"run": self.run})

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole."""
        whole = [path for path in self.checkpoints.glob("checkpoint-*") if (path / STATE).is_file()]
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def finish(self, record: dict[str, Any]) -> None:
        """Turn `model`, which is complete but for its record, into the output."""
        write_json(self.model / RECORD, {"run": self.run, **record})
        os.replace(self.model, self.output)
        shutil.rmtree(self.partial, ignore_errors=True)
