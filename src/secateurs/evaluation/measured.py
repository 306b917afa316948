"""All that was measured of one model, as `eval --output` and `sweep` record it and `report` draws it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateurs.checkpoint import RECORD, read_json, write_json

KEY = "measured"
"""Of such rows in `secateurs.json`."""


@dataclass(frozen=True)
class Measured:
    """One model's figures."""

    name: str
    bytes: int | None = None
    """Of its tensors, as they would be compressed where that pays."""
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """By text or task: perplexity, divergence (KL from the dense model's predictions, nats per token), or
    lm-eval's metrics."""
    method: str | None = None
    """That pruned it, where that is known; None of a dense model."""
    pattern: str | None = None
    values: str | None = None
    """What was left was rounded to."""
    sparsity: float | None = None
    """Share of zeros in the pruned layers."""
    seconds: float | None = None
    """Of pruning."""
    tokens_per_second: float | None = None
    """One token at a time, of the model as it is measured to be stored."""
    error: str | None = None
    """Why there are no figures, or not all."""

    @property
    def form(self) -> str:
        """What became of the weights, in a word or two."""
        return " ".join(part for part in (self.pattern, self.values) if part) or "dense"


def write_measured(folder: Path, rows: list[Measured], about: dict[str, Any]) -> None:
    """Write the record of a folder of figures; what is told about them goes beside."""
    write_json(folder / RECORD, {**about, KEY: [dataclasses.asdict(row) for row in rows]})


def read_measured(folder: Path) -> list[Measured]:
    """The rows of a folder's record; ValueError if it has none."""
    rows = read_json(folder / RECORD).get(KEY)
    if rows is None:
        raise ValueError(f"'{folder / RECORD}' is not the record of measurements")
    return [Measured(**row) for row in rows]
