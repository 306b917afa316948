"""A block pruned as one: attention first, and the MLP, as one problem (`SparseLLM`), sees what became of it.

Where the target lies beyond the layer, o and down are fitted to it and so make up for what was lost before
them, and at last all the weights that are left may be refined towards it together (`refine`).

What a block has beside one attention (or whatever mixes tokens) and one MLP is pruned matrix by matrix, or
expert by expert, each towards its own dense output.
"""

import time
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import secateurs.anatomy as anatomies
from secateurs import ranks
from secateurs.anatomy import Matrix
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.pruning.block.block import Advance, Block, Clock, Streams, Work, layer_report, prune_apart
from secateurs.pruning.block.experts import Experts, experts_of, route
from secateurs.pruning.block.local import Local
from secateurs.pruning.block.measure import Group, measure, observe
from secateurs.pruning.block.refine import refine as refined_by_descent
from secateurs.pruning.block.refine import shown_tokens
from secateurs.pruning.mlp.linear import Pruned, apply, pruning_of
from secateurs.pruning.mlp.problem import MLP, Tokens
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.record import BlockReport, ExpertsReport, LayerReport, MLPReport, Refinement
from secateurs.pruning.solvers.statistics import Products, Statistics

Target = Literal["layer", "block", "dense"]


class _Aims(NamedTuple):
    """What a dense block gives, a (batch, length, hidden) tensor for each batch."""

    attention: list[Tensor]
    """The stream with what o gives added; where o's result is not simply added, what o gives. Empty where
    there is not one o."""
    mlp: list[Tensor]
    """The block's result; where it does more than add, what down gives. Empty where there is not one MLP."""
    result: list[Tensor]


@dataclass(frozen=True)
class _Parts:
    """What of a block is pruned towards what the block is to give."""

    groups: tuple[Group, ...]
    """What is pruned matrix by matrix: all but experts and the MLPs that were understood."""
    mixer: Matrix | None
    """o, if the block has one."""
    mlp: anatomies.MLP | None
    """The MLP, if the block has one and no experts."""
    others: tuple[anatomies.MLP, ...]
    """More of them."""
    experts: tuple[Experts, ...]

    def adds(self, block: Block, matrix: Matrix | None) -> bool:
        """Whether what a matrix gives is simply added to the stream."""
        return matrix is not None and block.anatomy.residual and matrix.name in block.anatomy.factors


def _parts(block: Block) -> _Parts:
    anatomy = block.anatomy
    experts = tuple(experts_of(block))
    mlps = [mlp for mlp in anatomy.mlps if mlp.activation is not None and mlp.down.expert is None]
    solved = {matrix.name for mlp in mlps for matrix in (*mlp.first, mlp.down)}
    groups = [
        tuple(matrix for matrix in group if matrix.name not in solved and matrix.expert is None)
        for group in anatomy.groups
    ]
    mixers = [m for m in anatomy.matrices.values() if "o" in anatomy.roles.get(m.name, ())]
    one = len(mlps) == 1 and not experts and (mlps[0].down.name in anatomy.factors) <= anatomy.adds
    return _Parts(
        groups=tuple(group for group in groups if group),
        mixer=mixers[0] if len(mixers) == 1 else None,
        mlp=mlps[0] if one else None,
        others=() if one else tuple(mlps),
        experts=experts,
    )


@dataclass(frozen=True)
class Joint:
    """Prune with SparseLLM.

    Args:
        method: without iterations, it is a local solver with SparseLLM's fits.
        target: what is aimed at (see `prune`).
        repair: the share of what blocks before have lost that the target "dense" asks to make up for.
        refine: passes of the descent; 0 leaves it out.
    """

    method: SparseLLM
    target: Target
    repair: float
    refine: int

    @property
    def follows_dense(self) -> bool:
        return self.target == "dense"

    @property
    def head(self) -> int | None:
        return shown_tokens(ranks.world()) if self.refine else None

    def copies(self, model: BlockwiseModel) -> float:
        """See `BlockPruner.copies`."""
        hidden = model.text_config.hidden_size
        # The dense stream, two or three aims in float32, and what the MLP sees and aims at.
        streams = 8 if all(anatomy.adds for anatomy in model.anatomy.blocks) else 10
        if not self.method.rounds:
            return streams
        widest = max(
            (sum(matrix.shape[0] for matrix in mlp.first) for a in model.anatomy.blocks for mlp in a.mlps),
            default=0,
        )
        return streams + widest / hidden

    def prune(self, block: Block, streams: Streams, clock: Clock, advance: Advance) -> BlockReport:
        """See `BlockPruner.prune`."""
        report, parts = BlockReport(), _parts(block)
        aims = None
        if self.target != "layer":
            with clock("run"):
                aims = self._aims(block, parts, streams)
        for group in parts.groups:
            self._prune_group(block, parts, group, streams.pruned, aims, clock, advance, report)
        if aims is not None:
            aims.attention.clear()
        for mlp in [parts.mlp, *parts.others]:
            if mlp is not None and block.wanted((*mlp.first, mlp.down)):
                self._prune_mlp(block, parts, mlp, streams.pruned, aims, clock, report)
        for experts in parts.experts:
            self._prune_experts(block, experts, streams.pruned, clock, report)
        if self.refine and report.layers and aims is not None:
            with clock("refine"):
                report.refinements.append(self._refine(block, report.layers, streams.pruned, aims.result))
        errors = {layer.name: layer.error for layer in report.layers}
        told = {matrix.name for group in parts.groups for matrix in group}
        for matrix in block.anatomy.matrices.values():
            if matrix.name not in told:
                advance(block.name(matrix), errors.get(block.name(matrix)))
        return report

    def _aims(self, block: Block, parts: _Parts, streams: Streams) -> _Aims:
        """What a block is to give. Also pushes the dense stream on."""
        if streams.dense is None:
            return _aim(block, parts, streams.pruned)
        far = _aim(block, parts, streams.dense, keep=True)
        for batch, states in zip(streams.dense, far.result, strict=True):
            batch.states = states
        if self.repair == 1:
            return far
        near = _aim(block, parts, streams.pruned)

        def between(pair: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
            return [
                torch.lerp(here.float(), there.float(), self.repair)
                for here, there in zip(*pair, strict=True)
            ]

        attention, result = between((near.attention, far.attention)), between((near.result, far.result))
        # Where what down gives is simply added, what the MLP is to give is the block's result.
        adds = parts.mlp is not None and parts.adds(block, parts.mlp.down)
        return _Aims(attention, result if adds else between((near.mlp, far.mlp)), result)

    def _prune_group(
        self,
        block: Block,
        parts: _Parts,
        group: Group,
        hidden: list[Batch],
        aims: _Aims | None,
        clock: Clock,
        advance: Advance,
        report: BlockReport,
    ) -> None:
        """Prune q, k and v, or o, and whatever else shares an input, and report them."""
        if not block.wanted(group):
            for matrix in group:
                advance(block.name(matrix), None)
            return
        with clock("run"):
            moments, goal = _measure_group(block, parts, group, hidden, aims)
        work: Work = deque((matrix, partial(self._pruned, block, matrix, moments, goal)) for matrix in group)
        prune_apart(block, work, clock, advance, report)

    def _pruned(
        self, block: Block, matrix: Matrix, moments: Statistics, goal: Products | None, rows: Tensor | None
    ) -> Pruned:
        """Rows of a matrix by itself, fitted to its goal."""
        solver, damping = self.method.solver, self.method.damping
        return pruning_of(solver, block.linear(matrix), moments, goal, damping).do(rows)

    def _prune_mlp(
        self,
        block: Block,
        parts: _Parts,
        mlp: anatomies.MLP,
        hidden: list[Batch],
        aims: _Aims | None,
        clock: Clock,
        report: BlockReport,
    ) -> None:
        """Prune an MLP as one problem, and report it."""
        start = time.monotonic()
        with clock("run"):
            tokens = _mlp_tokens(block, parts, mlp, hidden, aims)
        name = block.path if mlp is parts.mlp else block.name(mlp.down)
        self._solve_mlp(block, mlp, tokens, name, start, clock, report)

    def _solve_mlp(
        self,
        block: Block,
        mlp: anatomies.MLP,
        tokens: Tokens,
        name: str,
        start: float,
        clock: Clock,
        report: BlockReport,
    ) -> None:
        matrices = (*mlp.first, mlp.down)
        *first, down = (block.linear(matrix) for matrix in matrices)
        problem = MLP(tuple(first), down, gated=mlp.gated, activation=block.activation(mlp))
        try:
            with clock("solve"):
                solution = self.method.prune(problem, tokens)
        except FloatingPointError as error:
            raise FloatingPointError(f"the MLP of '{name}': {error}") from None
        reports = []
        for matrix, pruned in zip(matrices, (*solution.first, solution.down), strict=True):
            if block.pattern(matrix) is not None:
                block.store(matrix, pruned)
                reports.append(layer_report(block.name(matrix), pruned, 0.0))
        share = round((time.monotonic() - start) / len(reports), 4)  # they are solved together
        report.layers.extend(replace(layer, seconds=share) for layer in reports)
        if self.method.rounds:
            report.mlps.append(MLPReport(name, solution.iterates, solution.kept))

    def _prune_experts(
        self, block: Block, experts: Experts, hidden: list[Batch], clock: Clock, report: BlockReport
    ) -> None:
        """Prune each expert as an MLP of its own, towards what it gives now for its tokens."""
        if not block.wanted(experts.matrices):
            return
        with clock("run"):
            routed = route(block, hidden, experts)
        report.experts.append(ExpertsReport(f"{block.path}.{experts.home}", routed.counts()))
        local = Local(self.method.solver, "linear")
        for number, expert in enumerate(experts.members):
            if not block.wanted(expert.matrices):
                continue
            given = routed.tokens(number)
            if expert.mlp is None or expert.mlp.activation is None:
                local.prune_some(block, [expert], [given], clock, lambda name, error: None, report)
                continue
            start = time.monotonic()
            with clock("run"):
                outputs = _expert_outputs(block, expert.mlp, given)
            name = block.name(expert.down)
            self._solve_mlp(block, expert.mlp, Tokens(given, outputs), name, start, clock, report)

    def _refine(
        self, block: Block, layers: list[LayerReport], hidden: list[Batch], targets: list[Tensor]
    ) -> Refinement:
        """Refine the pruned matrices, if the block is better for it."""
        path, pruned = block.path, {layer.name for layer in layers}
        matrices = [matrix for matrix in block.anatomy.matrices.values() if block.name(matrix) in pruned]
        names = [name for matrix in matrices for name in (matrix.weight, matrix.bias) if name is not None]
        stored = {name: block.parameters[name] for name in dict.fromkeys(names)}
        try:
            found = refined_by_descent(block.model, block.index, stored, hidden, targets, passes=self.refine)
        except FloatingPointError as error:
            raise FloatingPointError(f"'{path}': {error}") from None
        for name, values in (found.parameters or {}).items():
            block.put(name, values)
        return Refinement(path, found.before, found.after, found.tokens)


def _aim(block: Block, parts: _Parts, hidden: list[Batch], *, keep: bool = False) -> _Aims:
    """What a dense block gives for an input."""
    mixer, down = parts.mixer, None if parts.mlp is None else parts.mlp.down
    wanted = [matrix for matrix in (mixer, down) if matrix is not None]
    aims = _Aims([], [], [])
    seen_by_batch = observe(block.model, block.index, hidden, outputs=wanted, whole=True, keep=keep)
    for batch, seen in zip(hidden, seen_by_batch, strict=True):
        assert seen.result is not None
        states = batch.states
        if mixer is not None:
            given = seen.outputs[mixer.name]
            aims.attention.append(_added(block, parts, mixer, states, given).to(states.device))
        aims.result.append(seen.result.to(states.device))
        if down is not None:
            adds = parts.adds(block, down)
            aims.mlp.append(aims.result[-1] if adds else seen.outputs[down.name].to(states.device))
    return aims


def _added(block: Block, parts: _Parts, matrix: Matrix, states: Tensor, given: Tensor) -> Tensor:
    """The stream with what a matrix gives added, or that alone where it is not simply added."""
    if not parts.adds(block, matrix):
        return given
    factor, given = block.anatomy.factors[matrix.name], given.view_as(states)
    return states.to(given.device) + (given if factor == 1 else factor * given)


def _measure_group(
    block: Block, parts: _Parts, group: Group, hidden: list[Batch], aims: _Aims | None
) -> tuple[Statistics, Products | None]:
    """Second moments of what matrices see; and for o, the products that it is fitted by."""
    model, matrix = block.model, group[0]
    if aims is None or group != (parts.mixer,):
        return measure(model, block.index, (group,), hidden)[group], None
    outputs, inputs = matrix.shape
    moments = Statistics(inputs, device=model.device)
    products = Products(outputs, inputs, device=model.device)
    for batch, aim, seen in zip(
        hidden, aims.attention, observe(model, block.index, hidden, inputs=group), strict=True
    ):
        given = seen.inputs[matrix.name].reshape(-1, inputs)
        wanted = aim.to(model.device).float()
        if parts.adds(block, matrix):
            wanted = _less(wanted, batch.states, block.anatomy.factors[matrix.name])
        moments.update(given)
        products.update(wanted.reshape(-1, outputs), given)
    ranks.pool(moments, products)
    return moments, products


def _less(wanted: Tensor, stream: Tensor, factor: float) -> Tensor:
    """What a matrix has to give for a stream, to which it is added times a factor, to become what is
    wanted."""
    rest = wanted - stream.to(wanted.device)
    return rest if factor == 1 else rest / factor


def _mlp_tokens(
    block: Block, parts: _Parts, mlp: anatomies.MLP, hidden: list[Batch], aims: _Aims | None
) -> Tokens:
    """What an MLP sees in a block whose attention is pruned, and what it ought to give."""
    tokens, down, anatomy = Tokens([], []), mlp.down, block.anatomy
    own = aims is None or mlp is not parts.mlp
    adds = parts.adds(block, down)
    rest = [m for m in anatomy.matrices.values() if m.name in anatomy.factors and m.name != down.name]
    outputs = [down] if own else rest if adds else []
    seen_by_batch = observe(block.model, block.index, hidden, inputs=mlp.first[:1], outputs=outputs)
    for i, (batch, seen) in enumerate(zip(hidden, seen_by_batch, strict=True)):
        states = batch.states
        if own or aims is None:
            wanted = seen.outputs[down.name]
        elif adds:
            wanted = aims.mlp[i].float() - states
            for matrix in rest:
                given, factor = seen.outputs[matrix.name].view_as(states), anatomy.factors[matrix.name]
                wanted = wanted - (given if factor == 1 else factor * given).to(states.device)
            factor = anatomy.factors[down.name]
            wanted = wanted if factor == 1 else wanted / factor
        else:
            wanted = aims.mlp[i]
        for kept, new in ((tokens.inputs, seen.inputs[mlp.first[0].name]), (tokens.targets, wanted)):
            kept.append(new.reshape(-1, new.shape[-1]).to(states.device, states.dtype))
    return tokens


def _expert_outputs(block: Block, mlp: anatomies.MLP, given: list[Tensor]) -> list[Tensor]:
    """What an expert gives for its tokens."""
    *first, down = (block.linear(matrix) for matrix in (*mlp.first, mlp.down))
    problem = MLP(tuple(first), down, gated=mlp.gated, activation=block.activation(mlp))
    stacked = problem.stacked()
    return [
        apply(down, problem.channels(apply(stacked, tokens.to(down.weight.device, down.weight.dtype)))).to(
            tokens.device, tokens.dtype
        )
        for tokens in given
    ]
