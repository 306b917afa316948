"""A grid of methods, patterns and values: each pruned, measured, and put beside the dense model.

The grid goes through `prune` and the measures of `evaluate`. A cell's figures are a file, written when it is
done, so a run that is killed goes on with the next; what fails is a row that says why.
"""

import csv
import dataclasses
import gc
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateurs.calibration.sequences import CalibrationText, calibration_text, sha256_of
from secateurs.checkpoint import RECORD, Checkpoint, check_place, output_lock, read_json, resolve, write_json
from secateurs.checkpoint.writing import write_text
from secateurs.device import resolve_device
from secateurs.evaluation.divergence import divergence
from secateurs.evaluation.measured import Measured, write_measured
from secateurs.evaluation.perplexity import default_length, perplexity
from secateurs.evaluation.speed import bench
from secateurs.evaluation.tasks import evaluate_tasks
from secateurs.pruning.record import Report
from secateurs.pruning.walk import prune
from secateurs.report.grid import Cell, Keep, SweepSettings
from secateurs.report.page import report
from secateurs.report.quality import numbers_of, table_of
from secateurs.report.sources import CELLS, Source, with_names
from secateurs.runtime.convert import compress, compressed_bytes
from secateurs.runtime.load import load_model
from secateurs.runtime.survey import NothingWorthIt
from secateurs.settings import takes
from secateurs.text import bos_id, evaluation_tokens, load_tokenizer, wants_bos
from secateurs.training.model import read_config
from secateurs.version import __version__

WINDOWS = 16
"""Of each text, for the divergence: both models run."""

GRID = ("output", "methods", "patterns", "values", "keep")
"""Settings that the figures of a cell do not depend on."""


@takes(SweepSettings)
def sweep(model: str | Path, *, settings: SweepSettings, progress: bool = False) -> list[Measured]:
    """Prune a model in many ways and measure them all.

    Args:
        model: a Hugging Face model folder with safetensors, or a name on the hub. It is only read.
        progress: say on standard error what is being done.

    Returns:
        The dense model's figures, then those of each cell. What could not be done has an `error`.

    Raises:
        ValueError: a mistake in the arguments, the model or a text; or the output was begun with others.
        OSError: the disk is too small or fails.
    """
    output, folder = Path(settings.output), resolve(model)
    check_place(output, Checkpoint(folder))
    with output_lock(output):
        return _sweep(folder, output, settings, Console(stderr=True, quiet=not progress))


def _sweep(folder: Path, output: Path, settings: SweepSettings, console: Console) -> list[Measured]:
    chosen = {
        field.name: _plain(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if field.name not in GRID
    }
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file()):
        raise ValueError(f"'{output}' holds something else: give another output folder")
    shared = _Shared(folder, settings, console)
    identity = {"model": str(folder.resolve()), **chosen, **shared.identity}
    if (output / RECORD).is_file() and read_json(output / RECORD).get("settings") != identity:
        raise ValueError(f"'{output}' was begun with other settings: give another output folder")
    about = {"settings": identity, "versions": {"secateurs": __version__, "torch": torch.__version__}}
    cells = settings.cells
    for cell in cells:
        _known(output / CELLS / f"{cell.name}.json", cell)
    (output / CELLS).mkdir(parents=True, exist_ok=True)
    if not (output / RECORD).is_file():
        write_measured(output, [], about)
    rows = [_known(output / CELLS / "dense.json") or shared.dense(output / CELLS / "dense.json")]
    for number, cell in enumerate(cells, start=1):
        file = output / CELLS / f"{cell.name}.json"
        row = _known(file, cell)
        if row is None:
            console.print(f"{number} of {len(cells)}: {cell.title}", highlight=False, markup=False)
            row = shared.cell(cell, file)
            if row.error:
                console.print(f"  failed: {row.error}", highlight=False, markup=False)
        rows.append(row)
        _tidy(output / CELLS, cells, rows[1:], settings.keep)
        write_measured(output, rows, about)
    _tables(output, rows)
    write_json(output / "table.json", [dataclasses.asdict(row) for row in rows])
    for place in _staying(rows[1:], settings.keep):
        if not _has_model(output / CELLS / cells[place].name):
            console.print(f"once more, to keep it: {cells[place].title}", highlight=False, markup=False)
            shared.prune(cells[place])
    report([output], output=output / "report.html", against=folder)
    return rows


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    if isinstance(value, Tensor):
        return "token ids"
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _known(file: Path, cell: Cell | None = None) -> Measured | None:
    """A cell's figures, if it is done; what failed is tried again. ValueError if they are another's."""
    row = Measured(**read_json(file)) if file.is_file() else None
    if row is None or row.error:
        return None
    if cell is not None and cell != Cell(str(row.method), str(row.pattern), row.values):
        raise ValueError(f"'{file}' is of '{row.name}', not of '{cell.title}': write it as it was")
    return row


class _Shared:
    """What all cells share: the dense model's folder, and tokens, read once."""

    def __init__(self, folder: Path, settings: SweepSettings, console: Console) -> None:
        self.folder, self.settings, self.console = folder, settings, console
        self.device = resolve_device(settings.device)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        checkpoint = Checkpoint(folder)
        config = read_config(checkpoint)
        decoder = config.get_text_config(decoder=True)
        self.bos = bos_id(self.tokenizer) if wants_bos(decoder.model_type, settings.asked_bos) else None
        self.length = settings.length or default_length(decoder)
        self.texts = {
            str(source): evaluation_tokens(source, self.tokenizer, field=settings.field)
            for source in ([settings.text] if isinstance(settings.text, str | Path) else settings.text)
        }
        for source, tokens in self.texts.items():
            if len(tokens) < self.length:
                raise ValueError(
                    f"'{source}' has {len(tokens)} tokens, one window needs {self.length}: give more, or a "
                    "smaller length"
                )
        self.text: CalibrationText | None = None
        if settings.calibration is not None:
            self.text = calibration_text(
                settings.calibration,
                checkpoint,
                config,
                self.device,
                samples=settings.samples,
                length=settings.length,
                seed=settings.seed,
                field=settings.field,
                bos=settings.asked_bos,
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What figures depend on beside the settings: what files hold, and defaults as they were taken."""
        model = json.dumps(Checkpoint(self.folder).identity(), sort_keys=True, default=str)
        return {
            "length": self.length,
            "bos": "no" if self.bos is None else "yes",
            "model_sha256": hashlib.sha256(model.encode()).hexdigest(),
            "calibration_sha256": None if self.text is None else self.text.record["sha256"],
            "text_sha256": {source: sha256_of(tokens) for source, tokens in self.texts.items()},
        }

    @cached_property
    def tokens(self) -> Tensor | None:
        """To calibrate on; what the model writes itself is kept for a sweep that goes on."""
        if self.text is None:
            return None
        written = Path(self.settings.output) / "written"
        if self.text.form:
            written.mkdir(exist_ok=True)
        return self.text.tokens(written if self.text.form else None, progress=not self.console.quiet)

    def reference(self) -> PreTrainedModel:
        """The dense model: read again for each cell, so that pruning has the memory."""
        return load_model(self.folder, self.settings.device)

    def dense(self, file: Path) -> Measured:
        self.console.print("the dense model", highlight=False)
        row = Measured("dense", compressed_bytes(self.folder), self._figures(self.reference()))
        row = self._timed(row, self.folder, file)
        write_json(file, dataclasses.asdict(row))
        return row

    def prune(self, cell: Cell) -> Report:
        """A cell's folder; what lies there without weights is made again."""
        settings = self.settings.of(cell, self.tokens)
        place = Path(settings.output)
        if place.is_dir() and not _has_model(place):
            shutil.rmtree(place)
        return prune(self.folder, settings, progress=not self.console.quiet)

    def cell(self, cell: Cell, file: Path) -> Measured:
        row = Measured(cell.title, method=cell.method, pattern=cell.pattern, values=cell.values)
        try:
            done = self.prune(cell)
            model = load_model(done.output, self.settings.device)
            row = replace(
                row,
                bytes=compressed_bytes(done.output),
                figures=self._figures(model, dense=self.reference()),
                sparsity=done.sparsity,
                seconds=round(done.seconds, 3),
            )
            del model
            row = self._timed(row, done.output, file)
        except Exception as error:  # whatever it is, the other cells go on
            row = replace(row, error=_said(error))
        gc.collect()
        write_json(file, dataclasses.asdict(row))
        return row

    def _figures(
        self, model: PreTrainedModel, dense: PreTrainedModel | None = None
    ) -> dict[str, dict[str, float]]:
        figures: dict[str, dict[str, float]] = {}
        for source, tokens in self.texts.items():
            figures[source] = {"perplexity": perplexity(model, tokens, length=self.length, bos=self.bos)}
            if dense is not None:
                figures[source]["divergence"] = divergence(
                    dense, model, tokens, length=self.length, windows=WINDOWS, bos=self.bos
                )
        if self.settings.tasks:
            figures |= evaluate_tasks(
                model,
                self.tokenizer,
                list(self.settings.tasks),
                task_data=self.settings.task_data,
                limit=self.settings.limit,
            )
        return figures

    def _timed(self, row: Measured, folder: Path, file: Path) -> Measured:
        """With tokens per second, or why there are none; the other figures stay."""
        try:
            return replace(row, tokens_per_second=self._pace(folder, file))
        except Exception as error:  # as in `cell`
            return replace(row, error=f"speed: {_said(error)}")

    def _pace(self, folder: Path, file: Path) -> float | None:
        """Tokens per second of a model, compressed if that pays."""
        if not self.settings.speed:
            return None
        packed = file.with_suffix(".packed")
        shutil.rmtree(packed, ignore_errors=True)
        try:
            compress(folder, packed)
            folder = packed
        except NothingWorthIt:
            pass
        try:
            return bench(folder, device=self.settings.device)[0].tokens_per_second
        finally:
            shutil.rmtree(packed, ignore_errors=True)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _has_model(folder: Path) -> bool:
    return Source(folder.name, folder, {}).has_model


def _staying(rows: Sequence[Measured], keep: Keep) -> list[int]:
    """Which cells' models stay, of those that have figures."""
    good = [place for place, row in enumerate(rows) if row.figures]
    if keep == "best":
        best: dict[str, int] = {}
        for place in good:
            form = rows[place].form
            if form not in best or _loss(rows[place]) < _loss(rows[best[form]]):
                best[form] = place
        return list(best.values())
    return good if keep == "all" else []


def _tidy(folder: Path, cells: Sequence[Cell], rows: Sequence[Measured], keep: Keep) -> None:
    """Delete the models that are not to stay: of each all but its record."""
    stay = _staying(rows, keep)
    for place, cell in enumerate(cells[: len(rows)]):
        if place not in stay and (folder / cell.name).is_dir():
            for path in (folder / cell.name).iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != RECORD:
                    path.unlink()


def _loss(row: Measured) -> float:
    """How far a model is from the dense one, in the mean over texts."""
    found = [figures["divergence"] for figures in row.figures.values() if "divergence" in figures]
    return sum(found) / len(found)


def _tables(output: Path, rows: list[Measured]) -> None:
    """table.md as people read it, .csv with all digits."""
    rows = with_names(rows)
    text = io.StringIO()
    head, lines = numbers_of(rows)
    csv.writer(text, lineterminator="\n").writerows([head, *lines])
    write_text(output / "table.csv", text.getvalue())
    table = table_of(rows)
    marked = [table.head, ("---",) * len(table.head), *table.rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in marked]
    write_text(output / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in cells))


def rich_table(rows: list[Measured]) -> RichTable:
    """The figures as text."""
    table = table_of(with_names(rows))
    shown = RichTable()
    for place, name in enumerate(table.head):
        shown.add_column(Text(name), justify="right" if place else "left")
    for line in table.rows:
        shown.add_row(*map(Text, line))
    return shown
