"""Where the weights went: what a pruned or rounded model's layers have lost, kept, and become.

Works on the files alone, one layer in memory at a time, so on any model folder, whoever pruned it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from secateurs.anatomy import anatomy_of
from secateurs.checkpoint import Checkpoint, resolve
from secateurs.checkpoint.names import skeleton_of
from secateurs.checkpoint.scales import read_scales
from secateurs.evaluation.inspect_pictures import draw
from secateurs.evaluation.inspection import LARGEST, MEDIAN, Inspection, LayerInspection, inspect_layer
from secateurs.evaluation.plot import check_folder
from secateurs.runtime.parameters import Parameters
from secateurs.settings import takes
from secateurs.values import Values

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """Show where a model's weights went: zeros, structure, bits and what was kept, layer by layer.

    Any model folder will do, whoever pruned it.

    Example: secateurs inspect my-llama-70 --against my-llama --output pictures
    """

    against: str | Path | None = None
    """The dense model that it was made from: what was kept of its largest weights, and how the distribution
    changed."""

    output: str | Path | None = None
    """A folder for pictures, PNG and SVG. Without it there is only the table."""


@takes(InspectSettings)
def inspect(model: str | Path, *, settings: InspectSettings) -> Inspection:
    """Look at every linear layer of a model's blocks.

    Args:
        model: a model folder, dense or compressed, or a name on the hub; pruned by whatever means.

    Raises:
        ValueError: a folder is broken, of no supported family, quantised, or the two models differ in shape;
            or pictures cannot be put where they are wanted.
    """
    against, output = settings.against, settings.output
    if output is not None:
        check_folder(Path(output))
    pruned, dense = Weights(model), None if against is None else Weights(against)
    for name, shape in pruned.shapes.items():
        if dense is not None and dense.shapes.get(name) != shape:
            raise ValueError(
                f"'{name}' is {shape} in '{model}' and {dense.shapes.get(name)} in '{against}': compare with "
                "the model that it was pruned from"
            )
    inspection = Inspection(
        str(model),
        [
            inspect_layer(
                name,
                kind,
                pruned.read(name),
                None if dense is None else dense.read(name),
                pruned.values.get(name),
            )
            for name, kind in pruned.kinds.items()
        ],
        pruned.tables,
    )
    if output is not None:
        draw(inspection, Path(output))
    return inspection


class Weights:
    """The linear layers of a model folder's blocks, read from its files one at a time."""

    def __init__(self, model: str | Path) -> None:
        checkpoint = Checkpoint(resolve(model))
        skeleton = skeleton_of(checkpoint)
        self._parameters = Parameters(checkpoint, skeleton)
        anatomy = anatomy_of(skeleton.config)
        self._matrices = {
            f"{anatomy.path}.{index}.{matrix.name}": (f"{anatomy.path}.{index}.{matrix.weight}", matrix)
            for index, block in enumerate(anatomy.blocks)
            for matrix in block.matrices.values()
        }
        roles = {
            f"{anatomy.path}.{index}.{name}": own
            for index, block in enumerate(anatomy.blocks)
            for name, own in block.roles.items()
        }
        self.kinds = {
            name: roles[name][0] if len(roles.get(name, ())) == 1 else name.rpartition(".")[2]
            for name in self._matrices
        }
        self.shapes = {name: matrix.shape for name, (_, matrix) in self._matrices.items()}
        grids = {name: values for name, (values, _) in read_scales(checkpoint.folder).items()}
        grids |= self._parameters.grids
        self.values = {
            name: grids[parameter] for name, (parameter, _) in self._matrices.items() if parameter in grids
        }
        """The grids of the layers that are rounded, as the folder's scales or packed weights have them."""
        others = grids.keys() - {parameter for parameter, _ in self._matrices.values()}
        self.tables = {name: grids[name] for name in sorted(others)}
        """Those of other parameters, which are embeddings and heads."""

    def read(self, name: str, most: int | None = None) -> Tensor:
        """A layer's weight, (out, in), float32; only evenly spaced rows of one of more than `most` values."""
        parameter, matrix = self._matrices[name]
        weight = matrix.of(self._parameters.read(parameter))
        if most is not None and weight.numel() > most:
            rows = max(1, most // weight.shape[1])
            weight = weight[torch.linspace(0, len(weight) - 1, rows).round().long()]
        return weight.float()


def print_tables(inspection: Inspection) -> None:
    """A table of all layers, a block's experts in one line, and one of their kinds, on standard output."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file is no reason to cut columns
    console.print(_table("layer", inspection.lines))
    console.print(_table("kind", inspection.kinds))
    said = [f"{inspection.model}: {inspection.sparsity:.2%} zeros in {len(inspection.layers)} layers"]
    said += [f"{name}: {values}" for name, values in inspection.tables.items()]
    for line in said:
        console.print(line, soft_wrap=True)


def _table(what: str, groups: dict[str, list[LayerInspection]]) -> "Table":
    """One line for each group of layers: means over weights, the least and most, and sums of what is dead."""
    from rich.table import Table

    rounded = any(layer.values for layers in groups.values() for layer in layers)
    caption = "rows, columns: least and most zeros in one, and how many hold nothing else"
    if rounded:
        caption += "; values: bits, and inputs that share a scale"
    table = Table(caption=caption)
    table.add_column(what)
    columns = ["zeros", "n:m", *(["values"] if rounded else []), "rows", "dead", "columns", "dead"]
    columns.append("median |w|")
    compared = any(layer.before for layers in groups.values() for layer in layers)
    if compared:
        columns += ["before", *(f"top {share:.0%} kept" for share in LARGEST)]
    for column in columns:
        table.add_column(column, justify="right")

    for name, layers in groups.items():
        patterns = {layer.pattern for layer in layers}
        cells = [
            f"{_mean(layers, [layer.sparsity for layer in layers]):.1%}",
            (patterns.pop() or "") if len(patterns) == 1 else "",
        ]
        if rounded:
            cells.append(", ".join(sorted({_bits(layer.values) for layer in layers})))
        for spreads in ([layer.rows for layer in layers], [layer.columns for layer in layers]):
            least, most = min(spread.least for spread in spreads), max(spread.most for spread in spreads)
            cells += [f"{least:.0%} to {most:.0%}", str(sum(spread.dead for spread in spreads))]
        cells.append(f"{_mean(layers, [layer.after.quantiles[MEDIAN] for layer in layers]):.2g}")
        if compared:
            before = [layer.before.quantiles[MEDIAN] if layer.before else math.nan for layer in layers]
            cells.append(f"{_mean(layers, before):.2g}")
            for index in range(len(LARGEST)):
                kept = [layer.largest_kept[index] if layer.largest_kept else math.nan for layer in layers]
                cells.append(f"{_mean(layers, kept):.1%}")
        table.add_row(name, *cells)
    return table


def _bits(values: Values | None) -> str:
    return "as stored" if values is None else f"int{values.bits}/{values.group}"


def _mean(layers: list[LayerInspection], values: list[float]) -> float:
    """Of the layers' values, weighted by their sizes."""
    return float(np.average(values, weights=[layer.weights for layer in layers]))
