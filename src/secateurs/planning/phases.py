"""What `prune` does beside its walk, counted as in `work`: what the model writes, what is measured on the
dense model, tables, recovery."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from secateurs.calibration.sequences import AT_ONCE
from secateurs.pattern import Unstructured
from secateurs.planning.memory import WEIGHTS, BlockMemory
from secateurs.planning.work import CALLS, Amounts, BlockWork, Kind, Text, rounding, sum_of
from secateurs.pruning.allocation.fitting import TOKENS
from secateurs.pruning.allocation.forms import GRIDS, SHARES
from secateurs.pruning.allocation.owl import OWL
from secateurs.pruning.allocation.sensitivity import MEASURED, SOLVER, Sensitivity
from secateurs.pruning.allocation.survey import Allocator
from secateurs.pruning.block.rounding import ToGrids
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.solver import Solver
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.tables import ROWS
from secateurs.recovery.run import HELD_OUT

OF_A_TOKEN = 1.1e-3
"""Seconds of Python in a block for each token of a batch that the model writes."""

SCORED = 40
"""Bytes for each weight in OWL's scores."""

COMPARED = 30
"""Bytes for each value of the stream where a block's output is compared with another."""

TRAINED, HELD = 90, 60
"""Bytes that are moved for each weight in a step of recovery; and more where it is held on a grid."""

DIVERGED = 150
"""Bytes for each logit of a step: both models', in float32, their exponentials and the gradient."""

BACKWARD = 1.5
"""Values that backpropagation keeps of a whole model for each that matrices are given or give: gate and up
share what they are given, and so do q, k and v."""

SAVED = 3
"""Checkpoints of recovery that are on the disk at once, each with the weights and the optimiser's two
moments in float32; and of the ten that are written."""


class Cost(NamedTuple):
    """Of a phase."""

    amounts: Amounts
    stays: float = 0.0
    """Bytes that are held all the while, where it computes."""
    passes: float = 0.0
    """The most bytes that come and go meanwhile."""


@dataclass(frozen=True)
class Whole:
    """A model, and its blocks as one process has them that sees all of the text.

    Args:
        blocks: in order.
        parameters: in all of them and outside.
        vocabulary: rows of a table.
        hidden: width of the stream.
        tables: how many the embedding and the head are.
    """

    blocks: Sequence[BlockWork]
    parameters: int
    vocabulary: int
    hidden: int
    tables: int

    @property
    def dtype_bytes(self) -> int:
        return self.blocks[0].dtype_bytes

    @property
    def bytes(self) -> float:
        """As the model is stored."""
        return float(self.parameters * self.dtype_bytes)

    @property
    def looked_at(self) -> float:
        """See `BlockMemory.looked_at`, of the largest."""
        return max(BlockMemory(block, self.hidden).looked_at() for block, _ in self.kinds())

    def kinds(self) -> Iterator[tuple[BlockWork, int]]:
        """Blocks that differ, and how many there are of each."""
        counts = Counter(id(block.anatomy) for block in self.blocks)
        known = {id(block.anatomy): block for block in self.blocks}
        return ((known[kind], count) for kind, count in counts.items())

    def passed(self, tokens: float, *, times: float = 1) -> Amounts:
        """All blocks and the head, for so many tokens."""
        total = Amounts({("run", "products"): 2.0 * times * tokens * self.vocabulary * self.hidden})
        for block, count in self.kinds():
            total.add(block.forward("run", tokens, times=times), count)
        return total


def written(model: Whole, text: Text) -> Cost:
    """What the model writes itself, token by token: `calibration/written.py`.

    Args:
        model: that writes.
        text: that is to be there.
    """
    rows = min(text.samples, max(1, AT_ONCE // text.length))
    steps = math.ceil(text.samples / rows) * (text.length - 1)
    heads = [block.anatomy.heads for block in model.blocks]
    # Keys and values, which heads of a group attend to together, and which are copied whole to append one.
    attended = sum(2.0 * each.kv_count * each.dim for each in heads if each)
    cached = attended * model.dtype_bytes
    amounts = model.passed(text.tokens)
    amounts["run", "attention"] = amounts["run", "calls"] = 0.0  # which are others for a token alone
    amounts["run", "recalled"] = text.tokens * attended * text.length / 2
    amounts["run", "drawn"] = float(text.tokens * model.vocabulary)
    amounts["run", "moved"] += steps * model.bytes + text.tokens * 3 * cached * text.length / 2
    amounts["run", "python"] = steps * OF_A_TOKEN * len(model.blocks)
    held = model.bytes + rows * text.length * cached * (1 + 2 / len(model.blocks))
    # Large tensors that grow, which an allocator gives back.
    return Cost(amounts.in_phase("text"), stays=held + 16.0 * rows * model.vocabulary)


def experts_scored(model: Whole) -> Cost:
    """One pass, with each choice of a token's by itself: `pruning/reap.py`."""
    total = Amounts({("run", "disk"): model.bytes})
    for block, count in model.kinds():
        of_block, groups = block.forward("run", block.text.tokens), block.expert_groups
        experts = sum(block.share(matrix) * math.prod(matrix.shape) for group in groups for matrix in group)
        # As a choice by itself a token goes twice to the same expert, and each choice makes a pass.
        of_block["run", "products"] += 2.0 * block.text.tokens * experts
        of_block["run", "shapes"] *= block.choices
        total.add(of_block, count)
    return Cost(total.in_phase("survey"), passes=model.looked_at)


def surveyed(model: Whole, allocator: Allocator) -> Cost:
    """An allocation's look at the dense model: `pruning/allocation/`."""
    if isinstance(allocator, Sensitivity):
        return _attempted(model, [SOLVER] * (len(MEASURED) + 1), allocator.tokens)
    total = _measured(model)
    if isinstance(allocator, OWL):
        total["run", "moved"] += SCORED * sum(block.weights for block in model.blocks)
    return Cost(total.in_phase("survey"), passes=model.looked_at)


def forms_measured(model: Whole) -> Cost:
    """What a budget is spent by: every matrix pruned and rounded alone, `allocation/fitting.py`."""
    return _attempted(model, [SparseGPT()] * (len(SHARES) - 1) + [Rounding(grid) for grid in GRIDS], TOKENS)


def _measured(model: Whole) -> Amounts:
    """Second moments of all inputs, and the way to the next block."""
    total = Amounts({("run", "disk"): model.bytes})
    for block, count in model.kinds():
        until = None if block.expert_groups else block.anatomy.groups[-1]
        of_block = block.forward("run", block.text.tokens, until)
        for group in block.anatomy.groups:
            tokens = block.text.tokens * block.share(group[0])
            of_block.add(block.moment("run", tokens, group[0].shape[1]))
        total.add(of_block, count)
    total.add(sum_of(block.pushed() for block in model.blocks[:-1]))
    return total


def _attempted(model: Whole, attempts: Sequence[Solver], tokens: int) -> Cost:
    """Also each matrix by each solver, and what that does to its block's output."""
    total, held = _measured(model), 0.0
    for block, count in model.kinds():
        length = block.text.length
        seen = min(block.text.samples, max(1, tokens // length)) * length
        one = replace(block, pattern=Unstructured(0.5))
        for group in block.anatomy.groups:
            rows, columns = group[0].shape
            for solver in {type(solver): solver for solver in attempts}.values():
                total.add(one.factored(solver, columns), count)
            for matrix in group:
                for solver in attempts:
                    total.add(one.solution(solver, *matrix.shape), count)
                if matrix.expert is None:
                    total.add(block.forward("run", seen), count * len(attempts))
                else:  # it alone, and back
                    flops = 6.0 * block.share(matrix) * seen * rows * columns * 3
                    total["run", "products"] += count * len(attempts) * flops
            total["run", "moved"] += count * len(group) * len(attempts) * COMPARED * seen * model.hidden
        # What the block gave, what it gives now and how far that is, in float32.
        held = max(held, BlockMemory(block, model.hidden).looked_at(attempts) + 12.0 * seen * model.hidden)
    return Cost(total.in_phase("survey"), passes=held)


def tables_rounded(model: Whole, text: Text) -> Cost:
    """The embedding and the head: `pruning/tables.py`."""
    last, width = model.blocks[-1], model.hidden
    total = last.pushed()
    total.add(last.moment("run", text.tokens, width))
    for _ in range(model.tables):
        total.add(last.factored(ToGrids(), width).in_phase("solve"))
        total.add(rounding(model.vocabulary, width))
        total["solve", "float32"] += 4.0 * model.vocabulary * width**2  # errors
    part = min(ROWS, model.vocabulary) * width
    held = 3.0 * model.vocabulary * width * model.dtype_bytes + 4.0 * (WEIGHTS[ToGrids] + 2) * part
    return Cost(total, passes=held + 16.0 * width**2 + BlockMemory(last, width).stream)


def recovered(model: Whole, tokens: int, batch: Text, *, low: bool, ranks: int, on_grid: bool) -> Cost:
    """Steps towards the dense model's predictions: `recovery/run.py`.

    Args:
        model: of which there are two.
        tokens: to train on.
        batch: a step's, of all ranks; its samples are as many as are there in all.
        low: whether products are in the dtype of the model, and not in float32.
        ranks: that share the work.
        on_grid: whether what is left is rounded.
    """
    together = batch.batch_size * batch.length
    steps = max(1, round(tokens / together))
    held_out = min(math.ceil(HELD_OUT / batch.length), max(1, batch.samples // 8)) * batch.length
    own = steps * together / ranks
    # The dense model forwards, the other forwards and back; both forwards, before and after, to judge by.
    amounts = model.passed(own, times=4)
    amounts.add(model.passed(held_out, times=4))
    amounts["run", "passed"] *= 4 / model.dtype_bytes
    if not low:
        amounts = _renamed(amounts, "products", "float32")
    weighed = TRAINED + (HELD if on_grid else 0)
    logits = (own + 2 * held_out) * model.vocabulary
    amounts["run", "moved"] += steps * weighed * model.parameters + DIVERGED * logits
    amounts["run", "calls"] += steps * CALLS["step"] * len(model.blocks)
    amounts["run", "disk"] += min(steps, 10) * 12.0 * model.parameters + 3 * model.bytes
    # In float32: weights, gradients and the optimiser's two moments; a mask of a byte; the dense model, and
    # where products are in the model's dtype what is multiplied. Logits of both, and in float32 to compare;
    # what the dense model's blocks give.
    multiplied = model.dtype_bytes if low else 0
    weights = (17.0 + multiplied) * model.parameters + model.bytes
    values = BACKWARD * (multiplied or 4) * sum(block.values for block in model.blocks)
    logits_bytes = (4 + multiplied + model.dtype_bytes) * model.vocabulary
    states = model.dtype_bytes * len(model.blocks) * model.hidden
    return Cost(amounts.in_phase("recover"), weights, together / ranks * (values + logits_bytes + states))


def _renamed(amounts: Amounts, kind: Kind, other: Kind) -> Amounts:
    return sum_of(
        Amounts({(phase, other if of == kind else of): amount}) for (phase, of), amount in amounts.items()
    )
