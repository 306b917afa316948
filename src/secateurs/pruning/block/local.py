"""A block pruned layer by layer, each towards its own dense output, as local methods are published."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

from torch import Tensor

from secateurs import ranks
from secateurs.anatomy import BlockAnatomy, Matrix
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.pruning.block.block import Advance, Block, Clock, Streams, Work, prune_apart
from secateurs.pruning.block.experts import Expert, Experts, channels, experts_of, route
from secateurs.pruning.block.measure import Group, alike, check_finite, measure
from secateurs.pruning.mlp.linear import Linear, Pruned, solve
from secateurs.pruning.record import BlockReport, ExpertsReport
from secateurs.pruning.solvers.solver import Solver, rounded
from secateurs.pruning.solvers.statistics import Statistics

Sequential = Literal["block", "sublayer", "linear"]


def stages_of(anatomy: BlockAnatomy, sequential: Sequential) -> list[tuple[Group, ...]]:
    """Groups of matrices whose inputs are measured in one pass; experts come after all of them."""
    groups = tuple(group for group in anatomy.groups if group[0].expert is None)
    readers = [i for i, group in enumerate(groups) if anatomy.reads_mixed(group)]
    attention = readers[-1] + 1 if readers else 0
    stages: dict[Sequential, list[tuple[Group, ...]]] = {
        "block": [groups],
        "sublayer": [groups[:attention], groups[attention:]],
        "linear": [(group,) for group in groups],
    }
    return [stage for stage in stages[sequential] if stage]


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

    @property
    def head(self) -> None:
        return None

    def copies(self, model: BlockwiseModel) -> float:
        """See `BlockPruner.copies`."""
        # The stream, and the tokens that experts are given.
        return 2 if any(anatomy.experts for anatomy in model.anatomy.blocks) else 1

    def prune(self, block: Block, streams: Streams, clock: Clock, advance: Advance) -> BlockReport:
        """See `BlockPruner.prune`."""
        report = BlockReport()
        for stage in stages_of(block.anatomy, self.sequential):
            if not block.wanted(chain(*stage)):
                for matrix in chain(*stage):
                    advance(block.name(matrix), None)
                continue
            with clock("run"):
                statistics = measure(block.model, block.index, stage, streams.pruned)
            measured = ((group, statistics.pop(group)) for group in stage)
            prune_apart(block, self._work(block, measured), clock, advance, report)
        for experts in experts_of(block):
            self.prune_experts(block, experts, streams.pruned, clock, advance, report)
        return report

    def _pruned(self, block: Block, matrix: Matrix, moments: Statistics, rows: Tensor | None) -> Pruned:
        linear = block.linear(matrix).of_rows(rows)
        assert linear.pattern is not None
        weight = linear.weight.float()
        solution = solve(self.solver, weight, weight, moments, linear.pattern)
        sparse = rounded(solution.weight, linear.weight.dtype)
        return Pruned(
            Linear(sparse, None, linear.pattern),
            *moments.lost(weight, sparse),
            solution.objective,
            solution.scales,
        )

    def _work(self, block: Block, measured: Iterable[tuple[Group, Statistics]]) -> Work:
        """Matrices by groups, with the statistics of their inputs."""
        return deque(
            (matrix, partial(self._pruned, block, matrix, moments))
            for group, moments in measured
            for matrix in group
        )

    def prune_experts(
        self,
        block: Block,
        experts: Experts,
        hidden: list[Batch],
        clock: Clock,
        advance: Advance,
        report: BlockReport,
    ) -> None:
        """Prune experts one after the other, each on what it is given, and report them.

        What an expert's last matrix sees are its pruned channels if `sequential` is "linear", or else the
        dense ones.
        """
        if not block.wanted(experts.matrices):
            for matrix in experts.matrices:
                advance(block.name(matrix), None)
            return
        with clock("run"):
            routed = route(block, hidden, experts) if hidden else None
        if routed is not None:
            report.experts.append(ExpertsReport(f"{block.path}.{experts.home}", routed.counts()))
        for first in range(0, len(experts.members), ranks.world()):
            some = experts.members[first : first + ranks.world()]
            given = None if routed is None else [routed.tokens(first + i) for i in range(len(some))]
            self.prune_some(block, some, given, clock, advance, report)

    def prune_some(
        self,
        block: Block,
        experts: Sequence[Expert],
        given: Sequence[list[Tensor]] | None,
        clock: Clock,
        advance: Advance,
        report: BlockReport,
    ) -> None:
        """Prune some experts, shared out over ranks.

        Args:
            block: that they are in.
            experts: the experts.
            given: for each its tokens, (tokens, in) for each batch; None if all inputs count alike.
            clock: counts the time.
            advance: is told of each matrix.
            report: for what becomes of them.
        """
        firsts, downs = [expert.first for expert in experts], [(expert.down,) for expert in experts]
        if given is None:
            for group in chain(*zip(firsts, downs, strict=True)):
                same = alike(group[0].shape[1], block.model.device)
                prune_apart(block, self._work(block, [(group, same)]), clock, advance, report)
            return
        with clock("run"):
            measured = self._measured(block, firsts, given)
            shown: Sequence[Iterable[Tensor]] = [
                [channels(block, expert, tokens) for tokens in own]
                for expert, own in zip(experts, given, strict=True)
                if self.sequential != "linear"
            ]
        prune_apart(block, self._work(block, measured), clock, advance, report)
        del measured
        with clock("run"):
            shown = shown or [
                map(partial(channels, block, expert), own) for expert, own in zip(experts, given, strict=True)
            ]
            measured = self._measured(block, downs, shown)
        prune_apart(block, self._work(block, measured), clock, advance, report)

    def _measured(
        self, block: Block, groups: Sequence[Group], given: Sequence[Iterable[Tensor]]
    ) -> list[tuple[Group, Statistics]]:
        """Groups of matrices with the second moments of what each is given.

        Raises:
            FloatingPointError: that is not finite; names the matrix.
        """
        measured = []
        for group, own in zip(groups, given, strict=True):
            moments = Statistics(group[0].shape[1], device=block.model.device)
            for tokens in own:
                moments.update(tokens)
            ranks.pool(moments)
            check_finite(moments, block.name(group[0]))
            measured.append((group, moments))
        return measured
