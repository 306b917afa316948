"""The embedding and the head, rounded to a grid once all blocks are done.

The head is rounded as a layer is (`Rounding`), by the second moment of what it is given on the calibration
text. Of an embedding rows are read, so that all its inputs count alike. Where both are one table, the head's
second moment counts, and a tenth of its mean for every input: with 4 bits that loses least on the two models
it was tried on (docs/values.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from secateurs import ranks
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.checkpoint.names import skeleton_of
from secateurs.checkpoint.pieces import assemble, take_apart
from secateurs.pattern import Mask
from secateurs.pruning.record import TableReport
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.solver import rounded
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.runtime.layout import Codes, Layout, bytes_of_all
from secateurs.runtime.packable import packables, read_elsewhere
from secateurs.runtime.survey import WORTH, is_one_table
from secateurs.values import Values

SHARED = 0.1
"""Damping where the head and the embedding are one."""

ROWS = 16384
"""Rounded at a time: they do not depend on each other."""


@dataclass(frozen=True)
class Table:
    """A matrix (tokens, hidden) outside of the blocks.

    Args:
        parameters: the model's names of it: several that are tied.
        read: whether rows of it are read.
        multiplied: whether the head multiplies by it.
    """

    parameters: tuple[str, ...]
    read: bool
    multiplied: bool


@dataclass(frozen=True)
class RoundedTable:
    """What became of a table."""

    report: TableReport
    tensors: dict[str, Tensor]
    """As they are stored, by their names in the files."""
    scales: Tensor
    """(tokens, groups), bfloat16."""


def tables_of(model: BlockwiseModel) -> list[Table]:
    """The embedding and the head, as one if they are tied; of these what `compress` can pack.

    Raises:
        ValueError: that is neither.
    """
    skeleton = skeleton_of(model.checkpoint)
    elsewhere = read_elsewhere(skeleton)
    paths = {id(module): path for path, module in skeleton.named_modules()}
    head = paths.get(id(skeleton.get_output_embeddings()), "")
    tables = []
    for name, one in packables(skeleton).items():
        if not elsewhere.isdisjoint((name, *one.heads)):
            continue
        if one.by_row and is_one_table(one, model.pieces, partial(_read, model), skeleton):
            heads = tuple(f"{each}.weight" for each in one.heads)
            tables.append(Table((one.parameter, *heads), read=True, multiplied=head in one.heads))
        elif name == head:
            tables.append(Table((one.parameter,), read=False, multiplied=True))
    if not tables:
        raise ValueError(
            f"neither the embedding of '{model.checkpoint.folder}' nor its head can be packed as codes: "
            "leave embedding out"
        )
    return sorted(tables, key=lambda table: not table.read)


def _read(model: BlockwiseModel, parameter: str) -> Tensor:
    pieces = model.pieces[parameter]
    return assemble(pieces, model.checkpoint.load(sorted({piece.stored for piece in pieces})))


def bytes_saved(model: BlockwiseModel, tables: Sequence[Table], values: Values) -> int:
    """By `compress`, at the least, once the tables are rounded to a grid."""
    saved = 0
    for table in tables:
        stored = {piece for name in table.parameters for piece in model.pieces[name]}
        rows, columns = model.pieces[table.parameters[0]][0].parameter_shape
        layout = Layout(rows, columns, rows * columns, model.pieces[table.parameters[0]][0].dtype)
        packed = replace(layout, codes=Codes(values, False, bytes_of_all(layout, values))).bytes
        if packed <= WORTH * layout.dense_bytes:
            saved += sum(prod(piece.stored_shape) * piece.dtype.itemsize for piece in stored) - packed
    return saved


def round_tables(
    model: BlockwiseModel, tables: Sequence[Table], values: Values, states: list[Batch]
) -> Iterator[RoundedTable]:
    """Round them.

    Args:
        model: of which only what lies outside of the blocks is read.
        tables: see `tables_of`.
        values: the grid.
        states: what the last block gives for the calibration text; none if there is no text, and then all
            inputs count alike.

    Raises:
        FloatingPointError: what the head is given is not finite; names the table.
    """
    for table in tables:
        weight = _read(model, table.parameters[0])
        given = _second_moment(model, states, weight.shape[1]) if table.multiplied and states else None
        statistics = given
        if statistics is None:
            statistics = Statistics.from_inputs(torch.eye(weight.shape[1], device=model.device))
        shared = table.read and table.multiplied
        solver = Rounding(values, damping=SHARED if shared else Rounding.damping, shrinkage=0.0)
        parts, lost, energy = [], 0.0, 0.0
        for part in weight.split(ROWS):
            dense = part.to(model.device)
            try:
                parts.append(_solved(solver, dense, statistics))
            except FloatingPointError as reason:
                raise FloatingPointError(f"'{table.parameters[0]}': {reason}") from None
            lost += statistics.energy(dense.float() - parts[-1][0].float())
            energy += statistics.energy(dense)
        new, scales = (torch.cat([part[i].cpu() for part in parts]) for i in (0, 1))
        tensors: dict[str, Tensor] = {}
        for name in table.parameters:
            take_apart(new, model.pieces[name], tensors)
        error = max(lost, 0.0) / energy if energy else 0.0
        report = TableReport(list(table.parameters), error, by_head=given is not None)
        yield RoundedTable(report, tensors, scales)


def _second_moment(model: BlockwiseModel, states: list[Batch], width: int) -> Statistics | None:
    """Of what the head is given; None if the last block does not say what that is."""
    statistics = Statistics(width, device=model.device)
    with model.to_head() as to_head:
        for batch in states:
            given = to_head(batch)
            if given is None:
                return None
            statistics.update(given)
    ranks.pool(statistics)
    return statistics


def _solved(solver: Rounding, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Some rows in the dtype that they are stored in, and their scales."""
    solution = solver.solve(weight, statistics, Mask(torch.ones_like(weight, dtype=torch.bool)))
    assert solution.scales is not None
    return rounded(solution.weight, weight.dtype), solution.scales
