"""What a sweep is asked for: methods, patterns and values, and the cells that they make."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateurs.calibration.sources import Calibration
from secateurs.evaluation.measure import EvaluateSettings
from secateurs.pruning.settings import PruneSettings
from secateurs.report.sources import CELLS, name_of_cell
from secateurs.settings import InWindows, OnDevice

Keep = Literal["none", "best", "all"]

NONE = "none"
"""Among values: what is left stays as precise as it was."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings(InWindows, OnDevice):
    """Prune a model in many ways, measure all of them, and lay the figures side by side.

    Interrupt it whenever you like: the same command, also with more methods, patterns or values, goes on.

    Example: secateurs sweep my-llama --methods sparsellm admm --patterns 50% 2:4 --calibration text.txt
    --text novel.txt --output my-llama-sweep
    """

    output: str | Path
    """The folder for table.csv, table.json, table.md, report.html and the cells' records."""

    calibration: Calibration | None = None
    """As `prune` takes it; it is read once for all. Only magnitude does without."""

    methods: tuple[str, ...] = ("sparsellm", "admm", "sparsegpt")
    """As `prune` takes them, with settings or without."""

    patterns: tuple[str, ...] = ("50%", "60%", "70%", "2:4")
    """As `prune` takes them."""

    values: tuple[str, ...] = (NONE,)
    """What is left may be rounded to, as `prune` takes it, such as int4; none leaves it."""

    text: tuple[str | Path, ...] = ()
    """Texts to measure perplexity on, and the divergence of the dense model's predictions on the first 16
    windows."""

    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks."""

    task_data: str | Path | None = None
    """A folder with the tasks' data, where the hub is out of reach."""

    limit: int | None = None
    """Documents per task. By default all."""

    samples: int = 128
    """Calibration sequences."""

    seed: int = 0
    """Of the calibration sample."""

    speed: bool = False
    """Also measure tokens per second, of the compressed model."""

    keep: Keep = "none"
    """Which models stay in the output: none, all, or of each pattern the one that is nearest to the dense
    model."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit, in any cell."""
        if self.keep not in ("none", "best", "all"):
            raise ValueError(f"keep is none, best or all, not '{self.keep}'")
        if self.keep == "best" and not self.text:
            raise ValueError("keep best needs a text: the divergence on it says which model is best")
        EvaluateSettings(text=self.text, tasks=self.tasks, limit=self.limit, device=self.device)
        if self.samples < 1:
            raise ValueError(f"samples are at least 1, not {self.samples}")
        if not self.cells:
            raise ValueError("nothing to sweep: give methods and patterns")
        named: dict[str, Cell] = {}
        for cell in self.cells:
            if (other := named.setdefault(cell.name, cell)) != cell:
                raise ValueError(f"'{other.title}' and '{cell.title}' have one name: give one of them")
            self.of(cell, self.calibration)

    @property
    def cells(self) -> list["Cell"]:
        """All that is to be pruned, pattern by pattern. Without zeros and rounding it is the dense model."""
        grid = itertools.product(*(apart(each) for each in (self.patterns, self.values, self.methods)))
        cells = [
            Cell(method, pattern, None if values == NONE else values) for pattern, values, method in grid
        ]
        return [cell for cell in dict.fromkeys(cells) if cell.values or cell.pattern != "0%"]

    def of(self, cell: "Cell", calibration: Any) -> PruneSettings:
        """How a cell is pruned."""
        return PruneSettings(
            output=Path(self.output) / CELLS / cell.name,
            calibration=calibration,
            method=cell.method,
            pattern=cell.pattern,
            values=cell.values,
            samples=self.samples,
            length=self.length,
            device=self.device,
        )


@dataclass(frozen=True)
class Cell:
    """One way to prune."""

    method: str
    pattern: str
    values: str | None = None

    @property
    def title(self) -> str:
        return " ".join(part for part in (self.method, self.pattern, self.values) if part)

    @property
    def name(self) -> str:
        return name_of_cell(self.method, self.pattern, self.values)


def apart(given: Sequence[str]) -> list[str]:
    """Items, of which several may be one text with commas; "x:a=1,b=2" stays together."""
    items: list[str] = []
    for part in ",".join([given] if isinstance(given, str) else map(str, given)).split(","):
        if items and ":" in items[-1] and "=" in part and ":" not in part.partition("=")[0]:
            items[-1] += f",{part}"
        elif part.strip():
            items.append(part.strip())
    return items
