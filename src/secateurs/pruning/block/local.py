"""A block pruned layer by layer, each towards its own dense output, as local methods are published."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from torch import Tensor

from secateurs.anatomy import Matrix
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.pruning.block.block import Advance, Block, Clock, Streams, layer_report
from secateurs.pruning.block.experts import Expert, Experts, channels, experts_of, route
from secateurs.pruning.block.measure import Group, alike, check_finite, measure
from secateurs.pruning.mlp.linear import Linear, Pruned, solve
from secateurs.pruning.record import BlockReport, ExpertsReport, LayerReport
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
        for stage in self._stages(block):
            if not block.wanted(chain(*stage)):
                for matrix in chain(*stage):
                    advance(block.name(matrix), None)
                continue
            with clock("run"):
                statistics = measure(block.model, block.index, stage, streams.pruned)
            for group in stage:
                moments = statistics.pop(group)
                self.prune_group(block, group, moments, clock, advance, report)
                del moments  # its factors too, before the next group's
        for experts in experts_of(block):
            self.prune_experts(block, experts, streams.pruned, clock, advance, report)
        return report

    def _stages(self, block: Block) -> tuple[tuple[Group, ...], ...]:
        """Groups of matrices whose inputs are measured in one pass; experts come after all of them."""
        anatomy = block.anatomy
        groups = tuple(group for group in anatomy.groups if group[0].expert is None)
        readers = [
            i for i, group in enumerate(groups) if any("o" in anatomy.roles.get(m.name, ()) for m in group)
        ]
        attention = readers[-1] + 1 if readers else 0
        stages = {
            "block": (groups,),
            "sublayer": (groups[:attention], groups[attention:]),
            "linear": tuple((group,) for group in groups),
        }[self.sequential]
        return tuple(stage for stage in stages if stage)

    def prune_group(
        self,
        block: Block,
        group: Sequence[Matrix],
        moments: Statistics,
        clock: Clock,
        advance: Advance,
        report: BlockReport,
    ) -> None:
        """Prune matrices of one input, and report them."""
        for matrix in group:
            error = None
            if block.pattern(matrix) is not None:
                with clock("solve"):
                    report.layers.append(self._prune_matrix(block, matrix, moments))
                error = report.layers[-1].error
            advance(block.name(matrix), error)

    def _prune_matrix(self, block: Block, matrix: Matrix, moments: Statistics) -> LayerReport:
        start, name, linear = time.monotonic(), block.name(matrix), block.linear(matrix)
        assert linear.pattern is not None
        weight = linear.weight.float()
        try:
            solution = solve(self.solver, weight, weight, moments, linear.pattern)
            sparse = rounded(solution.weight, linear.weight.dtype)
        except FloatingPointError as error:
            raise FloatingPointError(f"'{name}': {error}") from None
        pruned = Pruned(
            Linear(sparse, None, linear.pattern),
            moments.error(weight, sparse),
            solution.objective,
            solution.scales,
        )
        block.store(matrix, pruned)  # in float32 `weight` may be the layer's own memory: not before
        return layer_report(name, pruned, time.monotonic() - start)

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
        for number, expert in enumerate(experts.members):
            given = None if routed is None else routed.tokens(number)
            self.prune_expert(block, expert, given, clock, advance, report)

    def prune_expert(
        self,
        block: Block,
        expert: Expert,
        given: list[Tensor] | None,
        clock: Clock,
        advance: Advance,
        report: BlockReport,
    ) -> None:
        """Prune one expert.

        Args:
            block: that it is in.
            expert: the expert.
            given: its tokens, (tokens, in) for each batch; None if all inputs count alike.
            clock: counts the time.
            advance: is told of each matrix.
            report: for what becomes of them.
        """
        device, matrices = block.model.device, (expert.first, (expert.down,))
        if given is None:
            for group in matrices:
                self.prune_group(block, group, alike(group[0].shape[1], device), clock, advance, report)
            return
        first, second = matrices
        with clock("run"):
            moments = Statistics(first[0].shape[1], device=device)
            for tokens in given:
                moments.update(tokens)
            check_finite(moments, block.name(first[0]))
            linear = self.sequential == "linear"
            dense = [] if linear else [channels(block, expert, tokens) for tokens in given]
        self.prune_group(block, first, moments, clock, advance, report)
        with clock("run"):
            moments = Statistics(second[0].shape[1], device=device)
            for part in dense or (channels(block, expert, tokens) for tokens in given):
                moments.update(part)
            check_finite(moments, block.name(second[0]))
        self.prune_group(block, second, moments, clock, advance, report)
