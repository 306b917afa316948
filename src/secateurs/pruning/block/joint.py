"""A block pruned as one: attention first, and the MLP, as one problem (`SparseLLM`), sees what became of it.

Where the target lies beyond the layer, o and down are fitted to it and so make up for what was lost before
them, and at last all the weights that are left may be refined towards it together (`refine`).
"""

import time
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from secateurs.anatomy import linear_weight
from secateurs.blockwise import BlockwiseModel
from secateurs.pruning.block.block import Advance, Block, Clock, Streams, layer_report
from secateurs.pruning.block.measure import Group, measure, observe
from secateurs.pruning.block.refine import refine as refined_by_descent
from secateurs.pruning.mlp.linear import prune_linear
from secateurs.pruning.mlp.problem import MLP, Tokens
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.record import BlockReport, LayerReport, MLPReport, Refinement
from secateurs.pruning.solvers.statistics import Products, Statistics

Target = Literal["layer", "block", "dense"]


class _Aims(NamedTuple):
    """What a dense block gives, a (batch, length, hidden) tensor for each batch."""

    attention: list[Tensor]
    """The block's input with what o gives added; where the block does more than add, what o gives."""
    mlp: list[Tensor]
    """The block's result; where it does more than add, what down gives."""
    result: list[Tensor]


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

    def copies(self, model: BlockwiseModel) -> float:
        """See `BlockPruner.copies`."""
        config, family = model.config, model.family
        # The dense stream, two or three aims in float32, and what the MLP sees and aims at.
        sizes, streams = family.sizes(config), 8 if family.adds(config) else 10
        if not self.method.iterations:
            return streams
        return streams + (2 if "gate" in family.roles else 1) * sizes.channels / sizes.hidden

    def prune(self, block: Block, streams: Streams, clock: Clock, advance: Advance) -> BlockReport:
        """See `BlockPruner.prune`."""
        report = BlockReport([], [], [])
        groups = block.model.family.groups
        aims = None
        if self.target != "layer":
            with clock("run"):
                aims = self._aims(block, streams)
        for group in groups[:2]:
            self._prune_attention(block, group, streams.pruned, aims, clock, advance, report)
        if aims is not None:
            aims.attention.clear()
        names = block.names(*groups[2:])
        if any(block.patterns[name] for name in names):
            self._prune_mlp(block, streams.pruned, aims, clock, report)
        if self.refine and report.layers and aims is not None:
            with clock("refine"):
                report.refinements.append(self._refine(block, report.layers, streams.pruned, aims.result))
        errors = {layer.name: layer.error for layer in report.layers}
        for name in names:
            advance(name, errors.get(name))
        return report

    def _aims(self, block: Block, streams: Streams) -> _Aims:
        """What a block is to give. Also pushes the dense stream on."""
        if streams.dense is None:
            return _aim(block, streams.pruned)
        far = _aim(block, streams.dense)
        streams.dense = far.result
        if self.repair == 1:
            return far
        near = _aim(block, streams.pruned)

        def between(pair: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
            return [
                torch.lerp(here.float(), there.float(), self.repair)
                for here, there in zip(*pair, strict=True)
            ]

        attention, result = between((near.attention, far.attention)), between((near.result, far.result))
        # Where a block only adds, what the MLP is to give is the result itself.
        return _Aims(attention, result if _adds(block) else between((near.mlp, far.mlp)), result)

    def _prune_attention(
        self,
        block: Block,
        group: Group,
        hidden: list[Tensor],
        aims: _Aims | None,
        clock: Clock,
        advance: Advance,
        report: BlockReport,
    ) -> None:
        """Prune q, k and v, or o, and report them."""
        names = block.names(group)
        if any(block.patterns[name] for name in names):
            with clock("run"):
                moments, goal = _measure_attention(block, group, hidden, aims)
        for name in names:
            error = None
            if block.patterns[name] is not None:
                with clock("solve"):
                    report.layers.append(self._prune_layer(block, name, moments, goal))
                error = report.layers[-1].error
            advance(name, error)

    def _prune_layer(
        self, block: Block, name: str, moments: Statistics, goal: Products | None
    ) -> LayerReport:
        """Prune a layer of the attention, fitted to its goal."""
        start, linear = time.monotonic(), block.linear(name)
        try:
            pruned = prune_linear(self.method.solver, linear, moments, goal, self.method.damping)
        except FloatingPointError as error:
            raise FloatingPointError(f"'{name}': {error}") from None
        block.store(name, pruned.layer.weight, pruned.layer.bias)
        return layer_report(name, pruned, time.monotonic() - start)

    def _prune_mlp(
        self, block: Block, hidden: list[Tensor], aims: _Aims | None, clock: Clock, report: BlockReport
    ) -> None:
        """Prune the MLP as one problem, and report it."""
        start, family = time.monotonic(), block.model.family
        with clock("run"):
            tokens = _mlp_tokens(block, hidden, aims)
        names = block.names(*family.groups[2:])
        *first, down = (block.linear(name) for name in names)
        mlp = MLP(
            first=tuple(first),
            down=down,
            gated="gate" in family.roles,
            activation=ACT2FN[getattr(block.model.config, family.activation)],
        )
        try:
            with clock("solve"):
                solution = self.method.prune(mlp, tokens)
        except FloatingPointError as error:
            raise FloatingPointError(f"the MLP of '{block.path}': {error}") from None
        reports = []
        for name, pruned in zip(names, (*solution.first, solution.down), strict=True):
            if block.patterns[name] is not None:
                block.store(name, pruned.layer.weight, pruned.layer.bias)
                reports.append(layer_report(name, pruned, 0.0))
        share = round((time.monotonic() - start) / len(reports), 4)  # they are solved together
        report.layers.extend(replace(layer, seconds=share) for layer in reports)
        if self.method.iterations:
            report.mlps.append(MLPReport(block.path, solution.iterates, solution.kept))

    def _refine(
        self, block: Block, layers: list[LayerReport], hidden: list[Tensor], targets: list[Tensor]
    ) -> Refinement:
        """Refine the pruned layers, if the block is better for it."""
        path = block.path
        stored = {
            f"{layer.name}.{leaf}".removeprefix(path + "."): tensor
            for layer in layers
            for leaf, tensor in block.stored(layer.name).items()
        }
        try:
            found = refined_by_descent(block.model, block.index, stored, hidden, targets, passes=self.refine)
        except FloatingPointError as error:
            raise FloatingPointError(f"'{path}': {error}") from None
        if found.parameters is not None:
            for name in (layer.name for layer in layers):
                inner, layer = name.removeprefix(path + "."), block.layer(name)
                weight, bias = (found.parameters.get(f"{inner}.{leaf}") for leaf in ("weight", "bias"))
                assert weight is not None
                block.store(name, weight if linear_weight(layer) is layer.weight else weight.T, bias)
        return Refinement(path, found.before, found.after)


def _adds(block: Block) -> bool:
    """Whether the block adds what o and down give to the stream, and does nothing else to it."""
    return block.model.family.adds(block.model.config)


def _aim(block: Block, hidden: list[Tensor]) -> _Aims:
    """What a dense block gives for an input."""
    adds, (_, (o,), _, (down,)) = _adds(block), block.model.family.groups
    aims = _Aims([], [], [])
    seen_by_batch = observe(block.model, block.index, hidden, outputs=(o, down), whole=True)
    for states, seen in zip(hidden, seen_by_batch, strict=True):
        assert seen.result is not None
        home, after = states.device, seen.outputs[o].view_as(states)
        aims.attention.append((states.to(after.device) + after if adds else after).to(home))
        aims.result.append(seen.result.to(home))
        aims.mlp.append(aims.result[-1] if adds else seen.outputs[down].view_as(states).to(home))
    return aims


def _measure_attention(
    block: Block, group: Group, hidden: list[Tensor], aims: _Aims | None
) -> tuple[Statistics, Products | None]:
    """Second moments of what q, k and v, or o, see; and for o, the products that it is fitted by."""
    model, name = block.model, group[0]
    if name != model.family.groups[1][0] or aims is None:
        return measure(model, block.index, (group,), hidden)[group], None
    outputs, inputs = linear_weight(model.blocks[block.index].get_submodule(name)).shape
    moments = Statistics(inputs, device=model.device)
    products = Products(outputs, inputs, device=model.device)
    for states, aim, seen in zip(
        hidden, aims.attention, observe(model, block.index, hidden, inputs=(name,)), strict=True
    ):
        given = seen.inputs[name].reshape(-1, inputs)
        wanted = aim.to(model.device).float()
        if _adds(block):
            wanted = wanted - states.to(model.device)
        moments.update(given)
        products.update(wanted.reshape(-1, outputs), given)
    return moments, products


def _mlp_tokens(block: Block, hidden: list[Tensor], aims: _Aims | None) -> Tokens:
    """What the MLP of a block whose attention is pruned sees, and what it ought to give."""
    (_, (o,), (first, *_), (down,)) = block.model.family.groups
    tokens = Tokens([], [])
    outputs = (down,) if aims is None else (o,) if _adds(block) else ()
    seen_by_batch = observe(block.model, block.index, hidden, inputs=(first,), outputs=outputs)
    for i, (states, seen) in enumerate(zip(hidden, seen_by_batch, strict=True)):
        if aims is None:
            wanted = seen.outputs[down]
        elif _adds(block):
            wanted = aims.mlp[i].float() - states - seen.outputs[o].view_as(states).to(states.device)
        else:
            wanted = aims.mlp[i]
        for kept, new in ((tokens.inputs, seen.inputs[first]), (tokens.targets, wanted)):
            kept.append(new.reshape(-1, new.shape[-1]).to(states.device, states.dtype))
    return tokens
