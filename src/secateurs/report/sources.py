"""The folders that a report is about: their records, read, and where weights are."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from secateurs.checkpoint import INDEX, RECORD, SINGLE, read_json
from secateurs.evaluation.measured import KEY as MEASURED
from secateurs.evaluation.measured import Measured, read_measured
from secateurs.pruning.record import Report
from secateurs.recovery.report import KEY as RECOVERY
from secateurs.recovery.report import RecoveryReport
from secateurs.training.report import TrainerReport, TrainingReport

PROFILE = "profile.json"
"""What `secateurs profile --output` writes."""

CELLS = "cells"
"""The folder, in that of a sweep, with a folder for each of its models: perhaps only their records."""


@dataclass(frozen=True)
class Source:
    """A folder, and what is recorded in it."""

    name: str
    folder: Path
    record: dict[str, Any]
    is_cell: bool = False
    """Whether it is one of a sweep's, and was not given itself."""

    @cached_property
    def pruning(self) -> Report | None:
        """How its model was pruned."""
        return Report.read(self.folder) if "layers" in self.record and "settings" in self.record else None

    @cached_property
    def trained(self) -> TrainerReport | None:
        """How its model was trained, or recovered after pruning."""
        if RECOVERY in self.record:
            return RecoveryReport.read(self.folder)
        return TrainingReport.read(self.folder) if "train_loss" in self.record else None

    @cached_property
    def measured(self) -> list[Measured]:
        """Of `eval` or `sweep`."""
        return read_measured(self.folder) if MEASURED in self.record else []

    @cached_property
    def activity(self) -> dict[str, Any] | None:
        """Of `profile`."""
        file = self.folder / PROFILE
        return read_json(file) if file.is_file() else None

    @property
    def has_model(self) -> bool:
        """Whether there are weights."""
        return any((self.folder / name).is_file() for name in (SINGLE, INDEX))

    @property
    def made_from(self) -> Path | None:
        """The dense model's folder, where the record names one that is there."""
        report = self.pruning or self.trained
        if report is None:
            return None
        settings = report.settings
        folder = Path(str(settings.get("towards") or settings.get("model")))
        return folder if (folder / "config.json").is_file() else None


def read_sources(folders: Sequence[str | Path]) -> list[Source]:
    """The folders' records, and of a sweep those of its cells; names are as short as tells them apart.

    Raises:
        ValueError: a folder holds no record, or one that cannot be read.
    """
    if not folders:
        raise ValueError("nothing to report on: give folders that prune, train, recover, eval or sweep made")
    places = [Path(folder) for folder in folders]
    short = {place.resolve().name for place in places}
    sources = [_read(place, names_are_unique=len(short) == len(places)) for place in places]
    for source in [*sources]:
        _check(source)
        cells = (
            source.folder / CELLS / name_of_cell(row.method, row.pattern, row.values)
            for row in source.measured
            if row.method and row.pattern
        )
        found = [cell for cell in cells if (cell / RECORD).is_file()]
        sources += [replace(_read(cell, names_are_unique=True), is_cell=True) for cell in found]
    for source in sources:
        _check(source)
    return sources


def _check(source: Source) -> None:
    """What is broken is found now."""
    try:
        _ = source.pruning, source.trained, source.measured, source.activity
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the record in '{source.folder}' is not one of ours ({error!r})") from None


def name_of_cell(method: str, pattern: str, values: str | None) -> str:
    """The folder of one of a sweep's models: without what file systems refuse."""
    pattern = pattern.replace(":", "of").rstrip("%")
    return re.sub(r"[^\w.=-]+", "_", "-".join(filter(None, (method, pattern, values))))


def _read(folder: Path, *, names_are_unique: bool) -> Source:
    if not folder.is_dir():
        raise ValueError(f"no folder at '{folder}'")
    file = folder / RECORD
    record = read_json(file) if file.is_file() else {}
    known = {"layers", "train_loss", RECOVERY, MEASURED} & record.keys()
    if not known and not (folder / PROFILE).is_file():
        raise ValueError(
            f"'{folder}' holds no record: give folders that prune, train, recover, profile, sweep or "
            "eval --output made"
        )
    return Source(folder.resolve().name if names_are_unique else str(folder), folder, record)


def _short(on: str, others: Iterable[str]) -> str:
    """A text's file name without its folder and ending, if that tells it from the others."""
    alike = sum(Path(other).stem == Path(on).stem for other in others)
    return Path(on).stem if alike == 1 else on


def with_names(rows: list[Measured], sources: Sequence[Source] = ()) -> list[Measured]:
    """Rows under short names; what `eval` measured of one of the folders says what was done to that model."""
    known = {source.folder.resolve(): source for source in sources}
    told = []
    for row in rows:
        source = known.get(Path(row.name).resolve())
        report = source.pruning if source else None
        figures = {_short(on, row.figures): metrics for on, metrics in row.figures.items()}
        row = replace(row, name=Path(row.name).name or row.name, figures=figures)
        if source is not None and report is not None and report.layers:
            method = str(report.settings["method"]["name"])
            row = replace(
                row,
                method=f"{method}, recovered" if isinstance(source.trained, RecoveryReport) else method,
                pattern=str(report.settings.get("pattern", "budget")),
                values=None if report.values is None else f"int{report.values.bits}",
                sparsity=report.sparsity,
                seconds=report.seconds,
            )
        told.append(row)
    return told
