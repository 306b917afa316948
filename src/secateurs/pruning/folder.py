"""The folder a run works in until its output is complete.

`OUTPUT.partial/model` has the weight files from the start, fills them block by block, and becomes `OUTPUT`
by one rename. `OUTPUT.partial/progress` remembers what they do not say, in files that appear whole or not
at all: a block is done if its report is there, which is written once its weights are on the disk.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from secateurs import ranks
from secateurs.blockwise import BlockwiseModel
from secateurs.calibration.sequences import CalibrationText, sha256_of
from secateurs.checkpoint import RECORD, check_output, copy_companions, read_json, write_json
from secateurs.checkpoint.card import write_card
from secateurs.checkpoint.output import is_free, partial_of, run_of, taken, unfinished
from secateurs.checkpoint.scales import read_scales, write_scales
from secateurs.checkpoint.shards import Shards, Stored
from secateurs.checkpoint.writing import write_tensors
from secateurs.pattern import parse_pattern
from secateurs.pruning.allocation.forms import Choice
from secateurs.pruning.allocation.survey import Patterns
from secateurs.pruning.record import BlockReport, ChoiceReport, Report
from secateurs.pruning.tables import RoundedTable
from secateurs.values import Values
from secateurs.version import __version__

FORMAT = 3
"""Of what the folder holds: a run does not go on in another."""

OTHERS = "settings, model or versions"
"""What tells another run."""


class WorkFolder:
    """Where a run's results gather. The main rank writes; what it remembers, it tells the others.

    Args:
        output: the folder that the run is to make.
        model: that it prunes.
        settings: all that decides the pruned model.
        most: bytes in one weight file.
        recover: tokens that it is recovered on at the end, if it is. The pruned model is the same without:
            who asks for other tokens, or for none, goes on from it.

    Raises:
        ValueError: the output folder, or an unfinished one, holds something else than this run's work.
        OSError: the disk has too little space for what is still to be written.
    """

    def __init__(
        self,
        output: Path,
        model: BlockwiseModel,
        settings: dict[str, Any],
        *,
        most: int,
        recover: int = 0,
    ) -> None:
        checkpoint = model.checkpoint
        # Through links: the last step is a rename, which would replace or trip over a link itself.
        self.output, self.blockwise, self.settings = output.resolve(), model, settings
        self.checkpoint = checkpoint
        self.versions = {
            "secateurs": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        identity = {
            "format": FORMAT,
            # Not how the model was spelled, but what it is.
            "settings": {name: value for name, value in settings.items() if name != "model"},
            "versions": self.versions,
            "checkpoint": checkpoint.identity(),
        }
        self.run = run_of(identity)
        self.asked = run_of({**identity, "recover": recover}) if recover else self.run
        self.partial = partial_of(self.output)
        self.model, self.progress = self.partial / "model", self.partial / "progress"
        self.recovered = self.partial / f"recovered-{self.asked[:8]}"
        self.parts = parts_of(model)
        self.shards = shards_of(model, self.model, most)
        self.phases = dict.fromkeys(("load", "run", "solve", "refine", "write"), 0.0)
        self.mark = self.progress / "run.json"
        self.finished, self.pruned, self.done = ranks.from_main(self._opened)

    def _opened(self) -> tuple[bool, bool, list[int]]:
        """Make the folder ready, and see what there is: `finished`, `pruned` and `done`."""
        finished = self._is_finished()
        if not finished:
            self._open()
        elif self._is_marked():  # stopped between its last two steps
            self._clear()
        # A model is complete with its card, which is written last; it may still be recovered.
        pruned = (self.model / "README.md").is_file()
        return finished, pruned, [i for i in range(len(self.parts) - 1) if self._report(i).exists()]

    def _is_finished(self) -> bool:
        if is_free(self.output):
            return False
        record = self.output / RECORD
        if not record.is_file() or read_json(record).get("run") != self.asked:
            raise taken(self.output)
        return True

    def _is_marked(self) -> bool:
        """Whether this run's mark is in the folder that it works in."""
        return self.mark.is_file() and read_json(self.mark).get("run") == self.run

    def _open(self) -> None:
        if self.mark.is_file():
            ours = self._is_marked()
        else:  # stopped before it could leave its mark, a run leaves nothing but empty folders
            leftovers = {self.model, self.progress, self.mark.with_name(self.mark.name + ".tmp")}
            ours = not self.partial.exists() or (
                self.partial.is_dir() and leftovers.issuperset(self.partial.rglob("*"))
            )
        if not ours:
            raise unfinished(self.partial, OTHERS)
        check_output(self.output, self.checkpoint, self.shards.missing_bytes)
        self.model.mkdir(parents=True, exist_ok=True)
        if not self.mark.is_file():
            # The mark makes the folder ours, so it must be there before any other file is.
            self.progress.mkdir(exist_ok=True)
            write_json(self.mark, {"run": self.run, "settings": self.settings})
        self.shards.lay_out()

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Count the time spent inside towards a phase, that of the GPU's queued work included."""
        start = time.monotonic()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.phases[phase] += time.monotonic() - start

    def write_outside(self) -> None:
        """Copy what lies outside the blocks: first of all, so that NaN there is found before the work."""
        done = self.progress / "outside.json"

        def write() -> None:
            if not done.exists():
                self.shards.write((name, self.checkpoint.load([name])[name]) for name in self.parts[0])
                write_json(done, {})

        ranks.from_main(write)

    def calibration(self, text: CalibrationText, progress: bool) -> Tensor:
        """The calibration tokens. What the model writes of them is kept: a run that goes on has the same."""
        if text.form is None:
            return text.tokens()
        with self.clock("run"):
            tokens = ranks.from_main(lambda: text.tokens(self.progress, progress=progress))
        self.settings["calibration"] = {**text.record, "sha256": sha256_of(tokens)}
        return tokens

    def allocation(self, survey: Callable[[], Patterns]) -> Patterns:
        """Each layer's pattern by a survey, which is made once: a run that goes on remembers it."""
        content = self._once(
            self.progress / "allocation.json",
            lambda: {name: pattern and str(pattern) for name, pattern in survey().items()},
        )
        return {name: text and parse_pattern(text) for name, text in content.items()}

    def forms(self, choose: Callable[[], Choice]) -> Choice:
        """What each matrix becomes, chosen once: a run that goes on remembers it."""
        content = self._once(self._forms, lambda: {"forms": choose().to_json()})
        return Choice.from_json(content["forms"])

    @property
    def _forms(self) -> Path:
        return self.progress / "forms.json"

    def choice(self, choose: Callable[[], list[ChoiceReport]]) -> list[ChoiceReport]:
        """Which experts are kept, chosen once: a run that goes on remembers them."""
        content = self._once(self._choice, lambda: {"choice": [asdict(block) for block in choose()]})
        return [ChoiceReport(**block) for block in content["choice"]]

    def _once(self, memory: Path, found: Callable[[], Any]) -> Any:
        """What a file remembers, or what is found and then written there: by the main rank, for all."""

        def remembered() -> Any:
            if not memory.exists():
                write_json(memory, found())
            return read_json(memory)

        return ranks.from_main(remembered)

    def tables(self, rounded: Callable[[], Iterable[RoundedTable]]) -> None:
        """The embedding and the head, rounded once: their weights and scales first, then what makes them
        count."""
        reports, scales = [], {}
        for table in rounded():
            ranks.from_main(partial(self.shards.write, table.tensors.items()))
            scales[table.report.parameters[0]] = table.scales
            reports.append(asdict(table.report))

        def write() -> None:
            write_tensors(self._table_scales, scales)
            write_json(self._tables, {"tables": reports})

        ranks.from_main(write)

    @property
    def rounds_tables(self) -> bool:
        """Whether the embedding and the head are still to be rounded."""
        return "embedding" in self.settings and not self._tables.exists()

    @property
    def _tables(self) -> Path:
        return self.progress / "tables.json"

    @property
    def _table_scales(self) -> Path:
        return self.progress / "scales-tables.safetensors"

    @property
    def _choice(self) -> Path:
        return self.progress / "choice.json"

    def block(self, index: int) -> dict[str, Tensor] | None:
        """A finished block's tensors by their names in the files, or None."""
        return self.shards.read(self.parts[index + 1]) if index in self.done else None

    def write_block(
        self,
        index: int,
        parameters: dict[str, Tensor],
        report: BlockReport,
        seconds: float,
        scales: dict[str, Tensor],
    ) -> None:
        """Record a block as done: its weights first, then the report that makes them count.

        Args:
            index: which block.
            parameters: what it holds as it is stored, by the names within the block.
            report: of it.
            seconds: that it took.
            scales: of what was rounded, by the names within the block.
        """
        counted = {"seconds": seconds, "phases": self.phases, "ranks": ranks.world()}

        def write() -> None:
            known = self.blockwise.stored_form(index, parameters)
            beside = self.checkpoint.load([name for name in self.parts[index + 1] if name not in known])
            self.shards.write((name, (known | beside)[name]) for name in self.parts[index + 1])
            if scales:
                write_tensors(self._scales(index), scales)
            write_json(self._report(index), {**counted, **asdict(report)})

        ranks.from_main(write)
        self.phases = dict.fromkeys(self.phases, 0.0)

    def _report(self, index: int) -> Path:
        return self.progress / f"block-{index:05}.json"

    def _scales(self, index: int) -> Path:
        return self.progress / f"scales-{index:05}.safetensors"

    def complete(self, seconds: float, grids: Mapping[str, Values]) -> None:
        """Make `model`, all of whose blocks are done, a whole model folder.

        Args:
            seconds: what the run took beside its blocks.
            grids: that matrices, by their names in the model, were rounded to.
        """
        with self.clock("write"):
            written = {"config.json"} if self.checkpoint.edited else set()
            copy_companions(self.checkpoint.folder, self.model, replaced={"README.md", *written})
            for name in written:
                write_json(self.model / name, self.checkpoint.config)
            self.shards.finish()
            self._write_scales(grids)
        blocks = [read_json(self._report(index)) for index in range(len(self.parts) - 1)]
        counted = [self.phases, *(block["phases"] for block in blocks)]
        record = {
            "run": self.run,
            "settings": self.settings,
            "versions": self.versions,
            # Not of the run's identity: another number of them may go on.
            "ranks": sorted({block.get("ranks", 1) for block in blocks}),
            "dense": self.blockwise.anatomy.dense,
            "alone": self.blockwise.anatomy.alone,
            "seconds": round(seconds + sum(block["seconds"] for block in blocks), 3),
            "phases": {phase: round(sum(part[phase] for part in counted), 3) for phase in self.phases},
            **{
                part.name: [entry for block in blocks for entry in block[part.name]]
                for part in fields(BlockReport)
            },
            **{key: value for path in self._remembered() for key, value in read_json(path).items()},
        }
        write_json(self.model / RECORD, record)
        report = Report.read(self.model)
        write_card(
            self.model,
            self.checkpoint.folder,
            self.settings["model"],
            title=report.title,
            facts=report.facts,
            usage="",
            tags=report.tags,
        )

    def _remembered(self) -> list[Path]:
        """What is remembered of the model outside of its blocks."""
        return [path for path in (self._choice, self._forms, self._tables) if path.exists()]

    def _write_scales(self, grids: Mapping[str, Values]) -> None:
        """All that there are, in one file: also those that the model had, of what is as it was."""
        scales = {
            name: scale
            for name, scale in read_scales(self.checkpoint.folder).items()
            if name in self.blockwise.pieces and self._is_as_it_was(name)
        }
        for index, anatomy in enumerate(self.blockwise.anatomy.blocks):
            path, block = self._scales(index), f"{self.blockwise.path}.{index}"
            values = {
                matrix.weight: grids.get(f"{block}.{matrix.name}") for matrix in anatomy.matrices.values()
            }
            for name, tensor in (load_file(path) if path.exists() else {}).items():
                grid = values[name]
                assert grid is not None
                scales[f"{block}.{name}"] = grid, tensor
        if "embedding" in self.settings:
            grid = Values(**self.settings["embedding"])
            scales |= {name: (grid, tensor) for name, tensor in load_file(self._table_scales).items()}
        if scales:
            write_scales(self.model, scales)

    def _is_as_it_was(self, parameter: str) -> bool:
        stored = {piece.stored for piece in self.blockwise.pieces[parameter]}
        return all(
            torch.equal(self.checkpoint.load([name])[name], self.shards.read([name])[name]) for name in stored
        )

    def release(self, folder: Path) -> Report:
        """Turn a complete folder into the output."""
        report = Report.read(folder)
        os.replace(folder, self.output)
        self._clear()
        return replace(report, output=self.output)

    def _clear(self) -> None:
        """Delete the folder, its mark last of all files: until then what is left is known for this run's."""
        shutil.rmtree(self.model, ignore_errors=True)
        for path in self.progress.iterdir():
            if path != self.mark:
                with suppress(OSError):
                    path.unlink()
        shutil.rmtree(self.partial, ignore_errors=True)


def parts_of(model: BlockwiseModel) -> list[list[str]]:
    """Names of stored tensors: those outside the blocks, then those of each block."""
    blocks = _apart([model.block_tensors(index) for index in range(len(model.blocks))])
    inside = {name for names in blocks for name in names}
    return [sorted(set(model.checkpoint.file_of) - inside), *blocks]


def shards_of(model: BlockwiseModel, folder: Path, most: int) -> Shards:
    """A model's weight files, of `most` bytes each, as a run writes them to a folder."""
    dtypes, shapes = model.checkpoint.dtypes, model.checkpoint.shapes
    names = [name for part in parts_of(model) for name in part]
    return Shards(folder, {name: Stored(dtypes[name], shapes[name]) for name in names}, most=most)


def begun(output: Path) -> bool:
    """Whether something is where a run's output is to be, or in the folder that it works in before."""
    return output.exists() or partial_of(output.resolve()).exists()


def check_not_taken(output: Path, settings: Mapping[str, Any]) -> None:
    """Find that a place is taken by another run, as far as can be known before any text is read.

    Args:
        output: the folder that a run is to make.
        settings: of the run, those that text has no say in.

    Raises:
        ValueError: as of `WorkFolder`, which knows the text and the model as well.
    """
    output = output.resolve()
    known = json.loads(json.dumps(settings, default=str))

    def is_other(record: Path) -> bool:
        held = read_json(record).get("settings")
        return not isinstance(held, dict) or any(held.get(name) != value for name, value in known.items())

    mark = partial_of(output) / "progress" / "run.json"
    if not is_free(output):
        if not (output / RECORD).is_file() or is_other(output / RECORD):
            raise taken(output)
    elif mark.is_file() and is_other(mark):
        raise unfinished(partial_of(output), OTHERS)


def _apart(blocks: list[list[str]]) -> list[list[str]]:
    """Each block's names without those of blocks before it, with which it may share weights."""
    seen: set[str] = set()
    own = []
    for names in blocks:
        own.append([name for name in names if name not in seen])
        seen.update(names)
    return own
