"""The embedding and the head, rounded to a grid once all blocks are done.

The head is rounded as a layer is (`Rounding`), by the second moment of what it is given on the calibration
text. Of an embedding rows are read, so that all its inputs count alike. Where both are one table, the head's
second moment counts, and a tenth of its mean for every input: with 4 bits that loses least on the two models
it was tried on (docs/values.md).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.checkpoint.pieces import assemble, take_apart
from secateurs.pattern import Mask
from secateurs.pruning.record import TableReport
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.solver import rounded
from secateurs.pruning.solvers.statistics import Statistics
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
    """The embedding and the head, as one if they are tied.

    Raises:
        ValueError: the embedding is no table that can be rounded.
    """
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    names = {id(module): f"{path}.weight" for path, module in model.model.named_modules()}
    if not isinstance(embedding, nn.Embedding) or names[id(embedding)] not in model.pieces:
        raise ValueError(
            f"the embedding of '{model.checkpoint.folder}' is a {type(embedding).__name__}, which cannot be "
            "rounded: leave embedding out"
        )
    first = names[id(embedding)]
    last = names[id(head)] if isinstance(head, nn.Linear) else None
    ties = model.model.all_tied_weights_keys
    if last in (None, first) or last not in model.pieces:
        return [Table((first,), read=True, multiplied=False)]
    assert last is not None
    if ties.get(last) == first or ties.get(first) == last:
        return [Table((first, last), read=True, multiplied=True)]
    return [Table((first,), read=True, multiplied=False), Table((last,), read=False, multiplied=True)]


def round_tables(model: BlockwiseModel, values: Values, states: list[Batch]) -> Iterator[RoundedTable]:
    """Round them.

    Args:
        model: of which only what lies outside of the blocks is read.
        values: the grid.
        states: what the last block gives for the calibration text; none if there is no text, and then all
            inputs count alike.

    Raises:
        FloatingPointError: what the head is given is not finite; names the table.
    """
    for table in tables_of(model):
        pieces = model.pieces[table.parameters[0]]
        stored = model.checkpoint.load(sorted({piece.stored for piece in pieces}))
        weight = assemble(pieces, stored)
        if table.multiplied and states:
            statistics = _second_moment(model.given_to_head(states), weight.shape[1], model.device)
        else:
            statistics = Statistics.from_inputs(torch.eye(weight.shape[1], device=model.device))
        solver = Rounding(values, damping=SHARED) if table.read and table.multiplied else Rounding(values)
        try:
            parts = [_solved(solver, part.to(model.device), statistics) for part in weight.split(ROWS)]
        except FloatingPointError as error:
            raise FloatingPointError(f"'{table.parameters[0]}': {error}") from None
        new, scales = (torch.cat([part[i].cpu() for part in parts]) for i in (0, 1))
        tensors: dict[str, Tensor] = {}
        for name in table.parameters:
            take_apart(new, model.pieces[name], tensors)
        lost = statistics.error(weight.to(model.device), new.to(model.device))
        report = TableReport(list(table.parameters), lost)
        yield RoundedTable(report, tensors, scales)


def _second_moment(inputs: Iterable[Tensor], width: int, device: torch.device) -> Statistics:
    statistics = Statistics(width, device=device)
    for given in inputs:
        statistics.update(given)
    return statistics


def _solved(solver: Rounding, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Some rows in the dtype that they are stored in, and their scales."""
    solution = solver.solve(weight, statistics, Mask(torch.ones_like(weight, dtype=torch.bool)))
    assert solution.scales is not None
    return rounded(solution.weight, weight.dtype), solution.scales
