"""A block pruned, and what is left of it rounded to grids.

Rounding is pruning once more, by a solver that keeps what was kept (`Rounding`): matrix by matrix, each to
its own grid and seeing what became of those before it; and where the first time o and down were fitted to
what lies beyond the layer, they are now fitted to what the block gave before any of it was rounded.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from secateurs.anatomy import Matrix
from secateurs.blockwise import BlockwiseModel
from secateurs.pattern import Mask, Pattern
from secateurs.pruning.allocation.forms import Form
from secateurs.pruning.allocation.survey import Patterns
from secateurs.pruning.block.block import Advance, Block, Clock, Streams
from secateurs.pruning.block.joint import Joint
from secateurs.pruning.block.local import Local
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.record import BlockReport, LayerReport
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.solver import Solution
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.runtime.codes import WORD, row_bytes, word_counts
from secateurs.values import Values


@dataclass(frozen=True)
class Rounded:
    """Prune, then round.

    Args:
        pruner: prunes.
        bounded: no matrix is to take more bytes than its form says (`Form.bytes`).
    """

    pruner: Joint | Local
    bounded: bool = False

    @property
    def follows_dense(self) -> bool:
        return self.pruner.follows_dense

    @property
    def head(self) -> int | None:
        return self.pruner.head

    def copies(self, model: BlockwiseModel) -> float:
        """See `BlockPruner.copies`."""
        return max(self.pruner.copies(model), self.rounder.copies(model))

    @property
    def rounder(self) -> Joint | Local:
        """Goes through the block once more."""
        inner = self.pruner.solver if isinstance(self.pruner, Local) else self.pruner.method.solver
        # The same sweep, damped as asked.
        solver = ToGrids(inner.damping) if isinstance(inner, SparseGPT) else ToGrids()
        if isinstance(self.pruner, Local):
            return Local(solver, "linear")
        return Joint(SparseLLM(solver, iterations=0), "block", 1.0, 0)

    def prune(self, block: Block, streams: Streams, clock: Clock, advance: Advance) -> BlockReport:
        """See `BlockPruner.prune`."""
        report = self.pruner.prune(block, streams, clock, advance)
        masks: Patterns = {
            block.name(matrix): self._mask(block, matrix) for matrix in block.anatomy.matrices.values()
        }
        if not any(masks.values()):
            return report
        masked = replace(block, patterns=masks)
        again = self.rounder.prune(masked, Streams(streams.pruned, None), clock, lambda name, error: None)
        rounded = {layer.name: layer for layer in again.layers}
        layers = [
            _rounded(layer, rounded[layer.name]) if layer.name in rounded else layer
            for layer in report.layers
        ]
        return replace(report, layers=layers)

    def _mask(self, block: Block, matrix: Matrix) -> "_OnGrid | None":
        """Of what is left of a pruned matrix that is to be rounded."""
        pattern, values = block.pattern(matrix), block.grids.get(block.name(matrix))
        if pattern is None or values is None:
            return None
        weight = block.linear(matrix).weight
        if pattern.sparsity:
            kept = weight != 0
            if self.bounded:
                size = Form(pattern.sparsity, values).masked_bytes(matrix.shape)
                kept = within(kept, weight, values, size)
        else:  # where the form has no mask, zeros would need one
            kept = torch.ones_like(weight, dtype=torch.bool) if self.bounded else Mask.of(weight).kept
        return _OnGrid(kept, values)


@dataclass(frozen=True)
class _OnGrid(Mask):
    """Which weights are rounded, and to what."""

    values: Values


@dataclass(frozen=True)
class ToGrids:
    """A solver that rounds a matrix to the grid that comes with its mask.

    Args:
        damping: as in `Rounding`.
    """

    damping: float = Rounding.damping

    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        """See `Solver.solve`."""
        assert isinstance(pattern, _OnGrid)
        return Rounding(pattern.values, damping=self.damping).solve(weight, statistics, pattern)


def within(kept: Tensor, weight: Tensor, values: Values, size: int) -> Tensor:
    """A mask without as many of its smallest weights as it takes for their codes to fit.

    Args:
        kept: (out, in), bool.
        weight: (out, in).
        values: what the codes are of.
        size: bytes of codes, at least 0.
    """
    kept = kept.clone(memory_format=torch.contiguous_format)
    columns = torch.arange(kept.shape[1], device=kept.device)
    odd = columns // max(values.group, WORD) % 2 == 1
    while True:
        filled = functional.pad(kept, (0, -kept.shape[1] % WORD))
        excess = int(row_bytes(word_counts(filled), values).sum()) - size
        if excess <= 0:
            return kept
        candidates = kept
        if values.bits == 4:  # the longer half of a row counts
            longer = (kept & odd).sum(dim=1) > (kept & ~odd).sum(dim=1)
            candidates = kept & (odd == longer[:, None])
        count = min(math.ceil(excess * (1 if values.bits == 4 else 8 / values.bits)), int(candidates.sum()))
        sizes = torch.where(candidates, weight.abs().float(), math.inf).flatten()
        kept.view(-1)[sizes.topk(count, largest=False).indices] = False


def _rounded(layer: LayerReport, rounded: LayerReport) -> LayerReport:
    return replace(
        layer,
        sparsity=rounded.sparsity,
        seconds=round(layer.seconds + rounded.seconds, 4),
        rounding=rounded.error,
    )
