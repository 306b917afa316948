"""A block pruned, and what is left of it rounded to grids.

Rounding is pruning once more, by a solver that keeps what was kept (`Rounding`): matrix by matrix, each seeing
what became of those before it; and where the first time o and down were fitted to what lies beyond the layer,
they are now fitted to what the block gave before any of it was rounded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from secateurs.blockwise import BlockwiseModel
from secateurs.pattern import Mask
from secateurs.pruning.block.block import Advance, Block, Clock, Streams
from secateurs.pruning.block.joint import Joint
from secateurs.pruning.block.local import Local
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.record import BlockReport, LayerReport
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.values import Values


@dataclass(frozen=True)
class Rounded:
    """Prune, then round.

    Args:
        pruner: prunes.
        values: the grid of what is left.
    """

    pruner: Joint | Local
    values: Values

    @property
    def follows_dense(self) -> bool:
        return self.pruner.follows_dense

    @property
    def head(self) -> int | None:
        return self.pruner.head

    def copies(self, model: BlockwiseModel) -> float:
        """See `BlockPruner.copies`."""
        return max(self.pruner.copies(model), self._rounder.copies(model))

    @property
    def _rounder(self) -> Joint | Local:
        solver = Rounding(self.values)
        if isinstance(self.pruner, Local):
            return Local(solver, "linear")
        return Joint(SparseLLM(solver, iterations=0), "block", 1.0, 0)

    def prune(self, block: Block, streams: Streams, clock: Clock, advance: Advance) -> BlockReport:
        """See `BlockPruner.prune`."""
        report = self.pruner.prune(block, streams, clock, advance)
        kept = replace(
            block, patterns={block.name(matrix): None for matrix in block.anatomy.matrices.values()}
        )
        kept.patterns.update(_masks(block))
        again = self._rounder.prune(kept, Streams(streams.pruned, None), clock, lambda name, error: None)
        rounded = {layer.name: layer for layer in again.layers}
        return replace(report, layers=[_rounded(layer, rounded[layer.name]) for layer in report.layers])


def _masks(block: Block) -> Iterator[tuple[str, Mask]]:
    """Of a pruned block: where a pattern without zeros leaves a 0, that is rounded like any other weight."""
    for matrix in block.anatomy.matrices.values():
        pattern = block.pattern(matrix)
        if pattern is not None:
            weight, _ = block.running(matrix)
            yield (
                block.name(matrix),
                Mask(weight != 0 if pattern.sparsity else torch.ones_like(weight, dtype=torch.bool)),
            )


def _rounded(layer: LayerReport, rounded: LayerReport) -> LayerReport:
    return replace(
        layer,
        sparsity=rounded.sparsity,
        seconds=round(layer.seconds + rounded.seconds, 4),
        rounding=rounded.error,
    )
