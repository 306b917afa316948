"""A block pruned layer by layer, each towards its own dense output, as local methods are published."""

import time
from dataclasses import dataclass
from typing import Literal

from secateurs.blockwise import BlockwiseModel
from secateurs.pattern import Pattern
from secateurs.pruning.block.block import Advance, Block, Clock, Streams, layer_report
from secateurs.pruning.block.measure import Group, measure
from secateurs.pruning.mlp.linear import Linear, Pruned
from secateurs.pruning.record import BlockReport, LayerReport
from secateurs.pruning.solvers.solver import Solver, rounded
from secateurs.pruning.solvers.statistics import Statistics

Sequential = Literal["block", "sublayer", "linear"]


@dataclass(frozen=True)
class Local:
    """Prune with a local solver alone.

    Args:
        solver: the solver.
        sequential: which pruned layers the inputs of a layer have seen when they are measured (see `prune`).
    """

    solver: Solver
    sequential: Sequential

    @property
    def follows_dense(self) -> bool:
        return False

    def copies(self, model: BlockwiseModel) -> float:
        """See `BlockPruner.copies`."""
        return 1

    def prune(self, block: Block, streams: Streams, clock: Clock, advance: Advance) -> BlockReport:
        """See `BlockPruner.prune`."""
        reports: list[LayerReport] = []
        for stage in self._stages(block.model):
            if not any(block.patterns[name] for name in block.names(*stage)):
                for name in block.names(*stage):
                    advance(name, None)
                continue
            with clock("run"):
                statistics = measure(block.model, block.index, stage, streams.pruned)
            for group in stage:
                moments = statistics.pop(group)
                for name in block.names(group):
                    pattern = block.patterns[name]
                    if pattern is not None:
                        with clock("solve"):
                            reports.append(self._prune_layer(block, name, moments, pattern))
                    advance(name, None if pattern is None else reports[-1].error)
                del moments  # its factors too, before the next group's
        return BlockReport(reports, [], [])

    def _stages(self, model: BlockwiseModel) -> tuple[tuple[Group, ...], ...]:
        """Groups of layers whose inputs are measured in one pass."""
        groups, attention = model.family.groups, len(model.family.attention)
        return {
            "block": (groups,),
            "sublayer": (groups[:attention], groups[attention:]),
            "linear": tuple((group,) for group in groups),
        }[self.sequential]

    def _prune_layer(self, block: Block, name: str, moments: Statistics, pattern: Pattern) -> LayerReport:
        start, stored = time.monotonic(), block.linear(name).weight
        weight = stored.float()
        try:
            solution = self.solver.solve(weight, moments, pattern)
            sparse = rounded(solution.weight, stored.dtype)
        except FloatingPointError as error:
            raise FloatingPointError(f"'{name}': {error}") from None
        pruned = Pruned(Linear(sparse, None, pattern), moments.error(weight, sparse), solution.objective)
        block.store(name, sparse, None)  # in float32 `weight` may be the layer's own memory: not before
        return layer_report(name, pruned, time.monotonic() - start)
