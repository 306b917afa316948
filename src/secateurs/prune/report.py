"""What a run did, in Python and as `secateurs.json` in the output folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateurs.checkpoint import read_json

RECORD = "secateurs.json"


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer."""

    name: str
    pattern: str
    sparsity: float
    """Share of weights that are zero."""
    weights: int
    error: float
    """Squared error of the layer's output on the calibration tokens, relative to the output's energy."""
    seconds: float
    objective: list[float]
    """For an iterative solver, the relative error after each iteration."""


@dataclass(frozen=True)
class Report:
    """What a run did."""

    output: Path
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    phases: dict[str, float]
    """Seconds to load, run (forward passes and second moments), solve and write."""
    layers: list[LayerReport] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """The report of a pruned model's folder; ValueError if it has none."""
        content = read_json(folder / RECORD)
        layers = [LayerReport(**layer) for layer in content["layers"]]
        shared = {key: content[key] for key in ("settings", "versions", "seconds", "phases")}
        return cls(output=folder, layers=layers, **shared)

    @property
    def sparsity(self) -> float:
        """Share of zeros in all pruned layers together."""
        return sum(x.sparsity * x.weights for x in self.layers) / sum(x.weights for x in self.layers)

    @property
    def error(self) -> float:
        """Mean relative error of the pruned layers."""
        return sum(layer.error for layer in self.layers) / len(self.layers)
