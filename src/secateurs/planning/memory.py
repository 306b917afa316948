"""What a run of `prune` holds at once: bytes by where they are, from a model's anatomy.

Every moment at which much is held is a sum of what is alive then, as the code has it; the peak is the
largest.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from secateurs.planning.work import BlockWork
from secateurs.pruning.block.joint import Joint
from secateurs.pruning.block.local import Local, stages_of
from secateurs.pruning.block.measure import Group
from secateurs.pruning.block.refine import TOKENS_A_STEP
from secateurs.pruning.block.rounding import ToGrids
from secateurs.pruning.mlp.problem import CHUNK
from secateurs.pruning.solvers.admm import ADMM, RHO
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.solver import Solver
from secateurs.pruning.solvers.sparsegpt import SparseGPT

WEIGHTS = {SparseGPT: 4, Rounding: 6, ToGrids: 6, ADMM: 12}
"""Copies of a matrix in float32 that a solver works with at once."""

COPIES = 8
"""The same of other solvers: most while a threshold is found."""

FACTORS = {SparseGPT: 1, Rounding: 2, ToGrids: 2, ADMM: len(RHO)}
"""Matrices as large as the second moment that a solver has made of it and kept; others none."""

FITTED = 3
"""More, while it is fitted."""

REFINED = 2
"""Bytes for each weight in the descent, beside its value and gradient as it is multiplied: what it is at
last."""

LEFT = 24
"""More for each that is left: its place, and beside that its value, gradient and two moments."""

SENT = 8
"""More for these over ranks: what is sent, and what comes of it."""

FORWARD = 4 / 3
"""Of the values that a block's matrices give for a batch, how many are there at once, with what is made of
them."""

BACKWARD = 12
"""Bytes for each value that a block's matrices are given or give, which backpropagation keeps."""


@dataclass(frozen=True)
class Held:
    """Bytes at one moment."""

    activations: float
    """Of the whole calibration text: in the device's memory if there is room, or else in the host's."""
    work: float
    """All else, where it is computed."""


class _Solving(NamedTuple):
    """Bytes while matrices are solved that see the same input."""

    statistics: float
    """Their input's second moment, with what is made of it."""
    matrix: float
    """The largest of them with what it becomes, or one more factor while that is made."""


@dataclass(frozen=True)
class BlockMemory:
    """What is held while a block is pruned.

    Args:
        work: what is done to it.
        hidden: width of the stream.
    """

    work: BlockWork
    hidden: int

    @property
    def stream(self) -> float:
        """Of the calibration text once, in the dtype that the model runs in."""
        return self.work.text.tokens * self.hidden * self.work.dtype_bytes

    @property
    def parameters(self) -> float:
        """Of the block's matrices as the model runs them."""
        return self.work.weights * self.work.dtype_bytes

    def moments(self) -> list[Held]:
        """What is held at each moment that may be the peak, beside the block itself."""
        return [
            held
            for pruner in self.work.pruners
            for held in (self._joint(pruner) if isinstance(pruner, Joint) else self._local(pruner))
        ]

    def forward(self) -> float:
        """A batch on its way."""
        tokens = self.work.text.batch_size * self.work.text.length
        widest = sum(self.work.share(m) * m.shape[0] for m in self.work.anatomy.matrices.values())
        return FORWARD * tokens * widest * self.work.dtype_bytes

    def _solving(self, solver: Solver, group: Group, *, fitted: bool = False) -> "_Solving":
        rows, columns = max((m.shape for m in group), key=lambda shape: shape[0] * shape[1])
        kept, copies = 1 + FACTORS.get(type(solver), 0), WEIGHTS.get(type(solver), COPIES)
        if fitted:
            copies += FITTED
            kept += not isinstance(solver, SparseGPT | ToGrids)
        square, size = 4.0 * columns**2, 4.0 * rows * columns
        making = 1 if kept > 1 else 0
        return _Solving(kept * square, max(making * square, copies * size))

    def sums(self, groups: Iterable[Group]) -> float:
        """Second moments of what groups see."""
        return sum(4.0 * group[0].shape[1] ** 2 for group in groups)

    def _local(self, pruner: Local) -> list[Held]:
        stream = self.stream
        found = []
        for stage in stages_of(self.work.anatomy, pruner.sequential):
            found.append(Held(stream, self.sums(stage) + self.forward()))
            for number, group in enumerate(stage):
                later = self.sums(stage[number + 1 :])
                found.append(Held(stream, later + sum(self._solving(pruner.solver, group))))
        for group in self.work.expert_groups:
            tokens = self.work.expert_tokens(group) * group[0].shape[1] * self.work.dtype_bytes
            found.append(Held(2 * stream, tokens + sum(self._solving(pruner.solver, group))))
        return found

    def looked_at(self, solvers: Collection[Solver] = ()) -> float:
        """While the dense block is surveyed: it and its copy, the text, second moments, and a batch on its
        way or a matrix that is tried.

        Args:
            solvers: that try each matrix; what they make of second moments is kept.
        """
        groups = self.work.anatomy.groups
        factors = sum(FACTORS.get(kind, 0) for kind in {type(solver) for solver in solvers})
        copies = max((WEIGHTS.get(type(solver), COPIES) for solver in solvers), default=0)
        largest = max(math.prod(matrix.shape) for matrix in self.work.anatomy.matrices.values())
        work = max(self.forward(), 4.0 * copies * largest)
        return 2 * self.parameters + self.stream + (1 + factors) * self.sums(groups) + work

    def _joint(self, pruner: Joint) -> list[Held]:
        stream, method = self.stream, pruner.method
        wide = stream * 4 / self.work.dtype_bytes
        follows = pruner.target == "dense"
        between = follows and pruner.repair < 1
        streams = stream * (2 if follows else 1)
        # What attention and the block are to give: of both streams at first, then what lies between.
        aims = {"layer": 0.0, "block": 2 * stream, "dense": stream}[pruner.target]
        found = []
        if between:
            found.append(Held(streams + 3 * stream + 2 * wide, self.forward()))
            aims = 2 * wide
        result = aims / 2 if not follows or between else 0.0
        for group in self.work.apart:
            fitted = self.work.is_fitted(pruner, group)
            products = 4.0 * group[0].shape[0] * group[0].shape[1] if fitted else 0.0
            sums = self.sums([group]) + products
            found.append(Held(streams + aims, sums + self.forward()))
            solving = sum(self._solving(method.solver, group, fitted=fitted))
            found.append(Held(streams + aims, products + solving))
        for mlp in self.work.mlps:
            of_expert = mlp.down.expert is not None
            tokens = self.work.text.tokens * self.work.share(mlp.down)
            held = streams + result + (stream if of_expert else 0)
            first = sum(m.shape[0] for m in mlp.first)
            kept = self.work.dtype_bytes * tokens * (2 * self.hidden + (first if method.rounds else 0))
            chunk = min(CHUNK, tokens) * first * (8 if self.work.low else 12)
            down = (mlp.down,)
            extra = 4.0 * mlp.down.shape[0] * mlp.down.shape[1]
            if method.rounds:
                extra += 4.0 * (first * mlp.first[0].shape[1] + 3 * mlp.down.shape[0] * mlp.down.shape[1])
            # What gate and up see stays, with what was made of it, for as long as the MLP is solved.
            shared, matrix = self._solving(method.solver, mlp.first, fitted=method.rounds > 0)
            found.append(Held(held + kept, shared + matrix + extra))
            found.append(Held(held + kept, shared + extra + self.sums([down]) + chunk))
            solving = sum(self._solving(method.solver, down, fitted=True))
            found.append(Held(held + kept, shared + extra + solving))
        if pruner.refine and pruner.target != "layer":
            left = 1 - self.work.pattern.sparsity
            each = REFINED + (4 if self.work.low else 8) + left * (LEFT + SENT * (self.work.ranks > 1))
            work = each * self.work.weights + BACKWARD * TOKENS_A_STEP * self.work.values
            found.append(Held(streams + result, work))
        return found
