"""A block that is being pruned: what the ways of pruning it share."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from secateurs import ranks
from secateurs.anatomy import MLP, BlockAnatomy, Matrix
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.pattern import Pattern
from secateurs.pruning.allocation.survey import Patterns
from secateurs.pruning.mlp.linear import Linear, Pruned, solving_cost
from secateurs.pruning.record import BlockReport, LayerReport
from secateurs.values import Values

Advance = Callable[[str, float | None], None]
"""Told the name of each layer that is done, and its error if it was pruned now."""

Clock = Callable[[str], AbstractContextManager[None]]
"""Counts the time inside towards a phase."""


@dataclass
class Streams:
    """The calibration activations before a block."""

    pruned: list[Batch]
    """Of the model as it is pruned so far."""
    dense: list[Batch] | None
    """Of the dense model, where that is the target."""


@dataclass(frozen=True)
class Block:
    """A materialised block, pruned in place."""

    model: BlockwiseModel
    index: int
    patterns: Patterns
    """Of all layers of the model."""
    parameters: dict[str, Tensor]
    """What the block holds as it will be stored, by the names within the block."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Of parameters that were rounded, by the names within the block: (rows, groups), or (experts, rows,
    groups); 0 for rows that were not."""
    grids: Mapping[str, Values] = field(default_factory=dict)
    """What is left of matrices is rounded to, by their names in the model; others stay as precise as they
    are."""

    @property
    def path(self) -> str:
        return f"{self.model.path}.{self.index}"

    @property
    def anatomy(self) -> BlockAnatomy:
        return self.model.anatomy.blocks[self.index]

    @property
    def module(self) -> nn.Module:
        return self.model.blocks[self.index]

    def activation(self, mlp: MLP) -> Callable[[Tensor], Tensor]:
        """The function of an MLP whose activation is known."""
        assert mlp.activation is not None
        own: nn.Module | None = dict(self.module.named_modules()).get(mlp.activation)
        function: Callable[[Tensor], Tensor] = ACT2FN[mlp.activation] if own is None else own
        return function

    def name(self, matrix: Matrix) -> str:
        """A matrix's name within the model."""
        return f"{self.path}.{matrix.name}"

    def pattern(self, matrix: Matrix) -> Pattern | None:
        return self.patterns[self.name(matrix)]

    def wanted(self, matrices: Iterable[Matrix]) -> bool:
        """Whether any of them is to be pruned."""
        return any(self.pattern(matrix) is not None for matrix in matrices)

    def linear(self, matrix: Matrix) -> Linear:
        """A matrix as it is stored, in whatever dtype the model runs. `store` may change it."""
        weight = matrix.of(self._stored(matrix.weight))
        bias = None if matrix.bias is None else matrix.bias_of(self._stored(matrix.bias))
        return Linear(weight, bias, self.pattern(matrix))

    def running(self, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
        """A matrix (out, in) and its bias as the model runs them."""
        weight = matrix.of(self.module.get_parameter(matrix.weight))
        bias = None if matrix.bias is None else matrix.bias_of(self.module.get_parameter(matrix.bias))
        return weight, bias

    def _stored(self, name: str) -> Tensor:
        """A parameter in the dtype that it is stored in, on the device."""
        running, stored = self.module.get_parameter(name), self.parameters[name]
        # A copy, for the reason given in `BlockwiseModel`: in a file a tensor lies at any address.
        return running if running.dtype == stored.dtype else stored.to(running.device, copy=True)

    def store(self, matrix: Matrix, pruned: Pruned) -> None:
        """Put a pruned matrix, in the dtype of the files, where the model runs it and where it is saved."""
        self._put(matrix.weight, matrix.of, pruned.layer.weight)
        if pruned.layer.bias is not None:
            assert matrix.bias is not None
            self._put(matrix.bias, matrix.bias_of, pruned.layer.bias)
        if pruned.scales is not None:
            self._scales_of(matrix, pruned.scales.shape).copy_(pruned.scales)

    def _scales_of(self, matrix: Matrix, shape: torch.Size) -> Tensor:
        """Where a matrix has its scales (rows, groups): a view."""
        if matrix.weight not in self.scales:
            experts = self.parameters[matrix.weight].numel() // math.prod(matrix.shape)
            whole = shape if matrix.expert is None else (experts, *shape)
            self.scales[matrix.weight] = torch.zeros(whole, dtype=torch.bfloat16)
        held = self.scales[matrix.weight]
        return held if matrix.expert is None else held[matrix.expert]

    def put(self, name: str, values: Tensor) -> None:
        """Put a whole parameter there, in the dtype of the files."""
        self._put(name, lambda parameter: parameter, values)

    def _put(self, name: str, part: Callable[[Tensor], Tensor], values: Tensor) -> None:
        part(self.module.get_parameter(name)).copy_(values)
        part(self.parameters[name]).copy_(values)


Work = deque[tuple[Matrix, Callable[[Tensor | None], Pruned]]]
"""Matrices none of which sees what becomes of another, each with what prunes some of its rows if it is to be
pruned."""


class BlockPruner(Protocol):
    """A way to prune a block."""

    @property
    def follows_dense(self) -> bool:
        """Whether it needs the dense stream."""
        ...

    @property
    def head(self) -> int | None:
        """How many first tokens of each sequence it also runs by themselves."""
        ...

    def copies(self, model: BlockwiseModel) -> float:
        """How many times the pruned stream's activations are kept at once."""
        ...

    def prune(self, block: Block, streams: Streams, clock: Clock, advance: Advance) -> BlockReport:
        """Prune a block in place, and push the dense stream, if there is one, through what it was before.

        The pruned stream stays before the block.
        """
        ...


def prune_apart(block: Block, work: Work, clock: Clock, advance: Advance, report: BlockReport) -> None:
    """Prune matrices, shared out over ranks, and report them.

    Args:
        block: that they are in.
        work: what is to be done. It is emptied, so that what is needed for it is let go of on the way.
        clock: counts the time.
        advance: is told of each matrix.
        report: for what becomes of them.

    Raises:
        FloatingPointError: one of them cannot be pruned; names it.
    """
    matrices = [matrix for matrix, _ in work]
    found = ranks.shared_out(_tasks(block, work), block.model.device)
    for matrix in matrices:
        error = None
        if block.pattern(matrix) is not None:
            with clock("solve"):
                parts = next(found)
                pruned = Pruned.joined([part for part, _ in parts], block.pattern(matrix))
                # In float32 what it was pruned from may be the layer's own memory: not before.
                block.store(matrix, pruned)
            report.layers.append(
                layer_report(block.name(matrix), pruned, sum(seconds for _, seconds in parts))
            )
            error = pruned.error
        advance(block.name(matrix), error)


def _tasks(block: Block, work: Work) -> deque[ranks.Task]:
    tasks = deque(
        ranks.Task(solving_cost(*matrix.shape), partial(_timed, block.name(matrix), prune), matrix.shape[0])
        for matrix, prune in work
        if block.pattern(matrix) is not None
    )
    work.clear()
    return tasks


def _timed(name: str, prune: Callable[[Tensor | None], Pruned], rows: Tensor | None) -> tuple[Pruned, float]:
    """What it gives, and the seconds that it took."""
    start = time.monotonic()
    try:
        return prune(rows), time.monotonic() - start
    except FloatingPointError as error:
        raise FloatingPointError(f"'{name}': {error}") from None


def layer_report(name: str, pruned: Pruned, seconds: float) -> LayerReport:
    weight = pruned.layer.weight
    return LayerReport(
        name=name,
        pattern=str(pruned.layer.pattern),
        sparsity=int((weight == 0).sum()) / weight.numel(),
        weights=weight.numel(),
        error=pruned.error,
        seconds=round(seconds, 4),
        objective=list(pruned.objective),
    )
