"""A block pruned, and what is left of it rounded to grids.

Rounding is pruning once more, by a solver that keeps what was kept (`Rounding`): matrix by matrix, each
seeing what became of those before it; and where the first time o and down were fitted to what lies beyond
the layer, they are now fitted to what the block gave before any of it was rounded.
"""

from dataclasses import dataclass, replace

from secateurs.blockwise import BlockwiseModel
from secateurs.pattern import Mask
from secateurs.pruning.allocation.survey import Patterns
from secateurs.pruning.block.block import Advance, Block, Clock, Streams
from secateurs.pruning.block.joint import Joint
from secateurs.pruning.block.local import Local
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.record import BlockReport, LayerReport
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.sparsegpt import SparseGPT
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
        inner = self.pruner.solver if isinstance(self.pruner, Local) else self.pruner.method.solver
        solver = Rounding(self.values)
        if isinstance(inner, SparseGPT):  # the same sweep, damped as asked
            solver = replace(solver, damping=inner.damping)
        if isinstance(self.pruner, Local):
            return Local(solver, "linear")
        return Joint(SparseLLM(solver, iterations=0), "block", 1.0, 0)

    def prune(self, block: Block, streams: Streams, clock: Clock, advance: Advance) -> BlockReport:
        """See `BlockPruner.prune`."""
        report = self.pruner.prune(block, streams, clock, advance)
        masked = replace(block, patterns=_masks(block))
        again = self._rounder.prune(masked, Streams(streams.pruned, None), clock, lambda name, error: None)
        rounded = {layer.name: layer for layer in again.layers}
        return replace(report, layers=[_rounded(layer, rounded[layer.name]) for layer in report.layers])


def _masks(block: Block) -> Patterns:
    """Of what is left of a pruned block."""
    masks: Patterns = {}
    for matrix in block.anatomy.matrices.values():
        pattern, weight = block.pattern(matrix), block.linear(matrix).weight
        if pattern is None:
            masks[block.name(matrix)] = None
        else:
            masks[block.name(matrix)] = Mask(weight != 0) if pattern.sparsity else Mask.of(weight)
    return masks


def _rounded(layer: LayerReport, rounded: LayerReport) -> LayerReport:
    return replace(
        layer,
        sparsity=rounded.sparsity,
        seconds=round(layer.seconds + rounded.seconds, 4),
        rounding=rounded.error,
    )
