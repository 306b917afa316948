"""Walk the blocks of a model: load one, calibrate, prune, write, go on.

Memory holds one block, its second moments and the calibration activations, whatever the depth. The only
state is the weights: a run that finds finished blocks pushes the activations through them and goes on.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from secateurs.anatomy import linear_weight
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint, resolve
from secateurs.device import home_of, resolve_device
from secateurs.pattern import Pattern
from secateurs.pruning.allocation import Allocation, as_pattern, describe_allocation, plan
from secateurs.pruning.magnitude import Magnitude
from secateurs.pruning.measure import Group, measure, observe
from secateurs.pruning.methods import Method, describe_method, parse_method
from secateurs.pruning.refine import refine as refined_by_descent
from secateurs.pruning.report import BlockReport, LayerReport, MLPReport, Refinement, Report
from secateurs.pruning.sensitivity import Sensitivity
from secateurs.pruning.solver import Solver, rounded
from secateurs.pruning.sparsellm import MLP, Linear, Pruned, SparseLLM, Tokens, prune_linear
from secateurs.pruning.statistics import Products, Statistics
from secateurs.pruning.survey import Survey, layer_shapes
from secateurs.pruning.workfolder import WorkFolder

Sequential = Literal["block", "sublayer", "linear"]
Target = Literal["layer", "block", "dense"]
Advance = Callable[[str, float | None], None]
"""Told the name of each layer that is done, and its error if it was pruned now."""

TOKENS_AT_ONCE = 2048

REPAIR = 0.5
"""By default: whether none or all of it is better depends on the text and the sparsity."""

REFINE = 8
"""Passes over the calibration text by default, where there is something to refine towards."""


def prune(
    model: str | Path,
    *,
    output: str | Path,
    calibration: str | Path | Tensor | None = None,
    method: str | Method = "sparsellm",
    pattern: str | float | Pattern = "50%",
    allocation: Allocation = "uniform",
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    field: str = "text",
    device: str | None = None,
    target: Target | None = None,
    repair: float | None = None,
    refine: int | None = None,
    sequential: Sequential | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Report:
    """Prune a pretrained decoder into a new folder that transformers loads.

    Blocks are materialised one at a time and written as they are done. If the run is interrupted, the same
    call continues it; on the same processor with the same threads the result has the same bytes. (On a GPU
    refinement rounds a little differently each time.)

    Args:
        model: a Hugging Face model folder with safetensors, or a name on the hub. It is only read.
        output: the new folder. Must not exist, unless this same run made it.
        calibration: text on which the layers' inputs are measured (see `secateurs.text`), or token ids
            (samples, length). Only magnitude pruning does without.
        method: SparseLLM or a local solver, or its name with settings, such as "sparsellm:solver=admm" or
            "sparsegpt:damping=0.02".
        pattern: which weights may stay: "70%" (of zeros) or "2:4" (two of every four inputs stay).
        allocation: how the pattern's zeros are shared out between layers: "uniform", "owl" or "sensitivity",
            with settings if need be ("owl:level=layer"). Or one pattern for each layer, whatever `pattern`
            says, by a table, a JSON file or a rule (see `secateurs.pruning.allocation.Allocation`).
        samples: number of calibration sequences.
        length: tokens in each; by default as many as the model was made for, and at most 2048.
        seed: of the calibration sample.
        field: of the calibration rows (jsonl, parquet, dataset) that holds the text.
        device: "cpu", "cuda", "cuda:1"...; by default a GPU where there is one.
        target: what is aimed at. Each layer's own dense output, for the inputs that it sees ("layer"; what
            local methods were published with); the dense block's, so that o and down make up for what
            was lost before them in the block ("block"); or the dense model's, so that they also make up
            for blocks before ("dense"; SparseLLM's default). Where a model normalises what o and down give
            (Gemma 2, OPT-350m), they aim at their own dense outputs in both.
        repair: the share of what blocks before have lost that the target "dense" asks o and down to make up
            for, above 0 and up to 1; by default half.
        refine: passes over the calibration text in which, once a block is pruned, gradient descent brings
            its remaining weights closer to the target, attention and MLP at once. By default 8 with
            SparseLLM, and 0 with local methods or the target "layer", which leaves nothing to refine.
        sequential: which pruned layers the inputs of a layer have seen when they are measured: those of
            the blocks before ("block", as published), also this block's attention ("sublayer"), or all
            that come before it ("linear"). SparseLLM, and any method with a target beyond the layer, sees
            them all, and sets the biases of the layers it prunes anew; others "block" by default.
        batch_size: sequences run at once; by default as many as make 2048 tokens.
        progress: show a progress bar on standard error.

    Returns:
        The record of the run, as it stands in `secateurs.json`.

    Raises:
        ValueError: a mistake in the arguments, the model folder or the text; found before any work is done
            where that is possible.
        FloatingPointError: a layer's inputs are not finite, or it cannot be pruned; names the layer.
        OSError: the disk is too small or fails. What is done stays, and the same call continues.
    """
    start = time.monotonic()
    solver = parse_method(method) if isinstance(method, str) else method
    if calibration is None and not isinstance(solver, Magnitude):
        raise ValueError(
            "calibration text is needed (a file, a folder or a dataset's name): only magnitude does without"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is a number of sequences, not {batch_size}")
    for given, known in ((target, Target), (sequential, Sequential)):
        if given is not None and given not in get_args(known):
            raise ValueError(f"'{given}' is none of {', '.join(get_args(known))}")
    target = target or ("dense" if isinstance(solver, SparseLLM) else "layer")
    if isinstance(solver, SparseLLM) or target != "layer":
        if sequential not in (None, "linear"):
            raise ValueError(
                f"sequential '{sequential}' does not go with SparseLLM, nor with a target beyond the layer: "
                "they see all that was pruned before ('linear')"
            )
        if calibration is None:
            raise ValueError(f"calibration text is needed for the target '{target}'")
        sequential = "linear"
    sequential = sequential or "block"
    if repair is not None and target != "dense":
        raise ValueError(f"repair goes with the target dense, not with {target}")
    if repair is None:
        repair = REPAIR
    if not 0 < repair <= 1:
        raise ValueError(f"repair is a share above 0 and up to 1, not {repair} (for 0, set target to block)")
    if refine is None:
        refine = REFINE if isinstance(solver, SparseLLM) and target != "layer" else 0
    if not isinstance(refine, int) or refine < 0:
        raise ValueError(f"refine is a number of passes, not {refine}")
    if refine and target == "layer":
        raise ValueError("refine goes towards what a block ought to give: set target to block or dense")
    where = resolve_device(device)
    checkpoint = Checkpoint(resolve(model))
    if Path(output).resolve() == checkpoint.folder.resolve():
        raise ValueError(f"'{output}' is the model's own folder: give another output folder")
    blockwise = BlockwiseModel(checkpoint, where)
    walk = _Walk(blockwise, solver, target, repair, refine, sequential)
    budget, shapes = as_pattern(pattern), layer_shapes(blockwise)
    planned = plan(allocation, budget, shapes)
    if calibration is None and isinstance(planned, Sensitivity):
        raise ValueError("an allocation by sensitivity is measured on calibration text: give some")
    tokens = None if calibration is None else _tokens(calibration, blockwise, samples, length, seed, field)
    if tokens is not None:
        batch_size = batch_size or max(1, TOKENS_AT_ONCE // tokens.shape[1])
        if refine and len(tokens) < 2:
            raise ValueError("refinement holds a calibration sequence out: give two or more (or refine 0)")
    settings = {
        "model": str(model),
        "method": describe_method(solver),
        "pattern": str(budget),
        "allocation": describe_allocation(planned, budget),
        "calibration": None
        if tokens is None
        else {
            "source": "token ids" if isinstance(calibration, Tensor) else str(calibration),
            "field": field,
            "samples": tokens.shape[0],
            "length": tokens.shape[1],
            "seed": seed,
            "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        },
        "target": target,
        "repair": repair if target == "dense" else None,
        "refine": refine,
        "sequential": sequential,
        "batch_size": batch_size,
        "device": where.type,
    }
    blocks = [blockwise.block_tensors(index) for index in range(len(blockwise.blocks))]
    work = WorkFolder(Path(output), checkpoint, blocks, settings)
    if work.finished:
        return Report.read(work.output)
    with work.clock("write"):
        work.write_outside()
    if isinstance(planned, dict):
        patterns = planned
    else:
        with _progress_bar(len(shapes), shown=progress) as advance:
            survey = Survey(
                blockwise, tokens, batch_size or 1, lambda name: advance(f"survey of {name}", None)
            )
            patterns = work.allocation(lambda: planned.allocate(survey, budget))
    with _progress_bar(len(patterns), shown=progress) as advance:
        in_blocks = walk.run(patterns, tokens, batch_size or 1, work, advance)
    return work.finish(time.monotonic() - start - in_blocks)


def _tokens(
    calibration: str | Path | Tensor,
    model: BlockwiseModel,
    samples: int,
    length: int | None,
    seed: int,
    field: str,
) -> Tensor:
    """(samples, length) ids to calibrate on."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(calibration, Tensor):
        tokens = calibration.cpu()
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
            raise ValueError("token ids must be an int64 tensor (samples, length), and not empty")
        length = tokens.shape[1]
    elif length is None:
        length = min(limit or 2048, 2048)
    if limit is not None and length > limit:
        raise ValueError(f"length {length} is more than the {limit} positions that the model was made for")
    if not isinstance(calibration, Tensor):
        from secateurs.text import calibration_blocks, load_tokenizer

        tokenizer = load_tokenizer(model.checkpoint.folder)
        tokens = calibration_blocks(
            calibration, tokenizer, samples=samples, length=length, seed=seed, field=field
        )
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(f"token {token} is outside the model's vocabulary of {model.config.vocab_size}")
    return tokens


@dataclass
class _Streams:
    """The calibration activations before a block: a (batch, length, hidden) tensor for each batch."""

    pruned: list[Tensor]
    """Of the model as it is pruned so far."""
    dense: list[Tensor] | None
    """Of the dense model, where that is the target."""


class _Aims(NamedTuple):
    """What a dense block gives, a (batch, length, hidden) tensor for each batch."""

    attention: list[Tensor]
    """The block's input with what o gives added; where the block does more than add, what o gives."""
    mlp: list[Tensor]
    """The block's result; where it does more than add, what down gives."""
    result: list[Tensor]


@dataclass(frozen=True)
class _Walk:
    """One pass over the blocks."""

    model: BlockwiseModel
    method: Method
    target: Target
    repair: float
    refine: int
    sequential: Sequential

    @property
    def joint(self) -> bool:
        """Whether layers are fitted to what their block, or the dense model, ought to give."""
        return self.target != "layer" or isinstance(self.method, SparseLLM)

    @property
    def solver(self) -> Solver:
        return self.method.solver if isinstance(self.method, SparseLLM) else self.method

    @property
    def _copies(self) -> float:
        """How many times the pruned stream's activations are kept at once."""
        if not self.joint:
            return 1
        config, family = self.model.config, self.model.family
        # The dense stream, two or three aims in float32, and what the MLP sees and aims at.
        sizes, streams = family.sizes(config), 8 if family.adds(config) else 10
        if not self._sparsellm.iterations:
            return streams
        return streams + (2 if "gate" in family.roles else 1) * sizes.channels / sizes.hidden

    @property
    def _sparsellm(self) -> SparseLLM:
        """The method of a joint walk: around a local solver, its fits alone."""
        return self.method if isinstance(self.method, SparseLLM) else SparseLLM(self.method, iterations=0)

    @property
    def stages(self) -> tuple[tuple[Group, ...], ...]:
        """Groups of layers whose inputs are measured in one pass."""
        family = self.model.family
        groups, attention = family.groups, len(family.attention)
        return {
            "block": (groups,),
            "sublayer": (groups[:attention], groups[attention:]),
            "linear": tuple((group,) for group in groups),
        }[self.sequential]

    def run(
        self,
        patterns: dict[str, Pattern | None],
        tokens: Tensor | None,
        batch_size: int,
        work: WorkFolder,
        advance: Advance,
    ) -> float:
        """Prune every block that is not done yet; returns the seconds spent on them."""
        model = self.model
        hidden: list[Tensor] = []
        home = model.device
        if tokens is not None:
            with work.clock("run"):
                hidden = model.embed(tokens, batch_size=batch_size)
                home = home_of(hidden, model.device, copies=self._copies)
                hidden = [states.to(home) for states in hidden]
        streams = _Streams(hidden, list(hidden) if self.target == "dense" else None)
        spent = 0.0
        for index in range(len(model.blocks)):
            start = time.monotonic()
            more = index + 1 < len(model.blocks)
            with work.clock("load"):
                finished = work.block(index)
                dense = finished is None or (more and streams.dense is not None)
                weights = model.checkpoint.load(model.block_tensors(index)) if dense else {}
            if finished is None:
                with model.block(index, weights):
                    prune = self._prune_jointly if self.joint else self._prune_block
                    report = prune(index, patterns, streams, weights, work, advance)
                    with work.clock("write"):
                        work.write_block(index, weights, report, time.monotonic() - start)
                    spent += time.monotonic() - start
                    if more:
                        self._push(index, streams.pruned, work)
            elif more:
                if streams.dense is not None:
                    with model.block(index, weights):
                        self._push(index, streams.dense, work)
                with model.block(index, finished):
                    self._push(index, streams.pruned, work)
            if finished is not None:
                for name in self._layers(index, model.family.groups):
                    advance(name, None)
        return spent

    def _push(self, index: int, hidden: list[Tensor], work: WorkFolder) -> None:
        """Replace the input of a materialised block by its result."""
        with work.clock("run"):
            for i, states in enumerate(hidden):
                hidden[i] = self.model.run(index, states.to(self.model.device)).to(states.device)

    def _layers(self, index: int, groups: tuple[Group, ...]) -> list[str]:
        return [f"{self.model.family.blocks}.{index}.{name}" for group in groups for name in group]

    def _prune_block(
        self,
        index: int,
        patterns: dict[str, Pattern | None],
        streams: _Streams,
        weights: dict[str, Tensor],
        work: WorkFolder,
        advance: Advance,
    ) -> BlockReport:
        """Prune a materialised block in place, layer by layer, and so `weights`, its tensors as they will be
        stored."""
        reports: list[LayerReport] = []
        for stage in self.stages:
            if not any(patterns[name] for name in self._layers(index, stage)):
                for name in self._layers(index, stage):
                    advance(name, None)
                continue
            with work.clock("run"):
                statistics = measure(self.model, index, stage, streams.pruned)
            for group in stage:
                moments = statistics.pop(group)  # freed as soon as its layers are done
                for name in self._layers(index, (group,)):
                    pattern = patterns[name]
                    if pattern is not None:
                        with work.clock("solve"):
                            reports.append(self._prune_layer(name, moments, pattern, weights))
                    advance(name, None if pattern is None else reports[-1].error)
        return BlockReport(reports, [], [])

    def _prune_jointly(
        self,
        index: int,
        patterns: dict[str, Pattern | None],
        streams: _Streams,
        weights: dict[str, Tensor],
        work: WorkFolder,
        advance: Advance,
    ) -> BlockReport:
        """The same with the target of o and of the MLP beyond themselves."""
        model = self.model
        report = BlockReport([], [], [])
        aims = None
        if self.target != "layer":
            with work.clock("run"):
                aims = self._aims(index, streams)
        for group in model.family.groups[:2]:
            names = self._layers(index, (group,))
            if any(patterns[name] for name in names):
                with work.clock("run"):
                    moments, products = self._measure_aim(index, group, streams.pruned, aims)
            for name in names:
                pattern = patterns[name]
                if pattern is not None:
                    with work.clock("solve"):
                        report.layers.append(self._prune_to(name, moments, products, pattern, weights))
                advance(name, None if pattern is None else report.layers[-1].error)
        names = self._layers(index, model.family.groups[2:])
        if any(patterns[name] for name in names):
            self._prune_mlp(index, patterns, streams.pruned, aims, weights, work, report)
        if self.refine and report.layers and aims is not None:
            with work.clock("refine"):
                report.refinements.append(
                    self._refine(index, report.layers, streams.pruned, aims.result, weights)
                )
        errors = {layer.name: layer.error for layer in report.layers}
        for name in names:
            advance(name, errors.get(name))
        return report

    def _aims(self, index: int, streams: _Streams) -> _Aims:
        """What a block is to give. Also pushes the dense stream on."""
        if streams.dense is None:
            return self._aim(index, streams.pruned)
        far = self._aim(index, streams.dense)
        streams.dense = far.result
        if self.repair == 1:
            return far
        near = self._aim(index, streams.pruned)

        def between(pair: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
            return [
                torch.lerp(here.float(), there.float(), self.repair)
                for here, there in zip(*pair, strict=True)
            ]

        attention, result = between((near.attention, far.attention)), between((near.result, far.result))
        adds = self.model.family.adds(self.model.config)  # then what the MLP is to give is the result itself
        return _Aims(attention, result if adds else between((near.mlp, far.mlp)), result)

    def _aim(self, index: int, hidden: list[Tensor]) -> _Aims:
        """What a materialised dense block gives for the target's activations."""
        model, adds = self.model, self.model.family.adds(self.model.config)
        o, down = model.family.groups[1][0], model.family.groups[3][0]
        aims = _Aims([], [], [])
        for states, seen in zip(
            hidden, observe(model, index, hidden, outputs=(o, down), whole=True), strict=True
        ):
            assert seen.result is not None
            home, after = states.device, seen.outputs[o].view_as(states)
            aims.attention.append((states.to(after.device) + after if adds else after).to(home))
            aims.result.append(seen.result.to(home))
            aims.mlp.append(aims.result[-1] if adds else seen.outputs[down].view_as(states).to(home))
        return aims

    def _measure_aim(
        self, index: int, group: Group, hidden: list[Tensor], aims: _Aims | None
    ) -> tuple[Statistics, Products | None]:
        """Second moments of what q, k and v, or o, see; and for o, the products that it is fitted by."""
        model = self.model
        name = group[0]
        if name != model.family.groups[1][0] or aims is None:
            return measure(model, index, (group,), hidden)[group], None
        layer = model.blocks[index].get_submodule(name)
        outputs, inputs = linear_weight(layer).shape
        moments = Statistics(inputs, device=model.device)
        products = Products(outputs, inputs, device=model.device)
        for states, aim, seen in zip(
            hidden, aims.attention, observe(model, index, hidden, inputs=(name,)), strict=True
        ):
            given = seen.inputs[name].reshape(-1, inputs)
            wanted = aim.to(model.device).float()
            if model.family.adds(model.config):
                wanted = wanted - states.to(model.device)
            moments.update(given)
            products.update(wanted.reshape(-1, outputs), given)
        return moments, products

    def _prune_mlp(
        self,
        index: int,
        patterns: dict[str, Pattern | None],
        hidden: list[Tensor],
        aims: _Aims | None,
        weights: dict[str, Tensor],
        work: WorkFolder,
        report: BlockReport,
    ) -> None:
        """Prune the MLP of a materialised block as one problem, and report it."""
        start = time.monotonic()
        model, family = self.model, self.model.family
        with work.clock("run"):
            tokens = self._mlp_tokens(index, hidden, aims)
        names = self._layers(index, family.groups[2:])
        layers = [model.model.get_submodule(name) for name in names]
        stored = weights[model.stored_name(names[-1] + ".weight")].dtype
        first = [
            Linear(linear_weight(layer).float(), _bias(layer), patterns[name])
            for name, layer in zip(names, layers, strict=True)
        ]
        mlp = MLP(
            first=tuple(first[:-1]),
            down=first[-1],
            gated="gate" in family.roles,
            activation=ACT2FN[getattr(model.config, family.activation)],
        )
        method = self._sparsellm
        block = f"{family.blocks}.{index}"
        try:
            with work.clock("solve"):
                solution = method.prune(mlp, tokens, stored=stored)
        except FloatingPointError as error:
            raise FloatingPointError(f"the MLP of '{block}': {error}") from None
        reports = []
        for name, pruned in zip(names, (*solution.first, solution.down), strict=True):
            if patterns[name] is not None:
                self._store(name, pruned.layer.weight, pruned.layer.bias, weights)
                reports.append(_report(name, pruned, 0.0))
        share = round((time.monotonic() - start) / len(reports), 4)  # they are solved together
        report.layers.extend(replace(layer, seconds=share) for layer in reports)
        if method.iterations:
            report.mlps.append(MLPReport(block, solution.iterates, solution.kept))

    def _refine(
        self,
        index: int,
        layers: list[LayerReport],
        hidden: list[Tensor],
        targets: list[Tensor],
        weights: dict[str, Tensor],
    ) -> Refinement:
        """Refine the pruned layers of a materialised block, if it is better for it."""
        path = f"{self.model.family.blocks}.{index}"
        pruned = {layer.name: self.model.model.get_submodule(layer.name) for layer in layers}
        stored = {
            f"{name}.{leaf}".removeprefix(path + "."): weights[self.model.stored_name(f"{name}.{leaf}")].dtype
            for name, layer in pruned.items()
            for leaf in ("weight", "bias")
            if isinstance(getattr(layer, leaf, None), Tensor)
        }
        try:
            found = refined_by_descent(self.model, index, stored, hidden, targets, passes=self.refine)
        except FloatingPointError as error:
            raise FloatingPointError(f"'{path}': {error}") from None
        if found.parameters is not None:
            for name, layer in pruned.items():
                inner = name.removeprefix(path + ".")
                weight, bias = (found.parameters.get(f"{inner}.{leaf}") for leaf in ("weight", "bias"))
                assert weight is not None
                self._store(name, weight if linear_weight(layer) is layer.weight else weight.T, bias, weights)
        return Refinement(path, found.before, found.after)

    def _mlp_tokens(self, index: int, hidden: list[Tensor], aims: _Aims | None) -> Tokens:
        """What the MLP of a block whose attention is pruned sees, and what it ought to give."""
        model, adds = self.model, self.model.family.adds(self.model.config)
        (_, (o,), (first, *_), (down,)) = model.family.groups
        tokens = Tokens([], [])
        block = observe(model, index, hidden, inputs=(first,), outputs=(o, down))
        for i, (states, seen) in enumerate(zip(hidden, block, strict=True)):
            if aims is None:
                wanted = seen.outputs[down]
            elif adds:
                wanted = aims.mlp[i].float() - states - seen.outputs[o].view_as(states).to(states.device)
            else:
                wanted = aims.mlp[i]
            for kept, new in ((tokens.inputs, seen.inputs[first]), (tokens.targets, wanted)):
                kept.append(new.reshape(-1, new.shape[-1]).to(states.device, states.dtype))
        return tokens

    def _prune_layer(
        self, name: str, moments: Statistics, pattern: Pattern, weights: dict[str, Tensor]
    ) -> LayerReport:
        """Prune a layer of a materialised block by the local solver alone."""
        start = time.monotonic()
        weight = linear_weight(self.model.model.get_submodule(name)).float()
        stored = weights[self.model.stored_name(name + ".weight")].dtype
        try:
            solution = self.solver.solve(weight, moments, pattern)
            sparse = rounded(solution.weight, stored)
        except FloatingPointError as error:
            raise FloatingPointError(f"'{name}': {error}") from None
        pruned = Pruned(
            Linear(sparse, None, pattern), moments.error(weight, sparse.float()), solution.objective
        )
        self._store(name, sparse, None, weights)  # in float32 `weight` is the layer's own memory: not before
        return _report(name, pruned, time.monotonic() - start)

    def _prune_to(
        self,
        name: str,
        moments: Statistics,
        goal: Products | None,
        pattern: Pattern,
        weights: dict[str, Tensor],
    ) -> LayerReport:
        """Prune a layer of a materialised block, fitted to its goal."""
        start, method = time.monotonic(), self._sparsellm
        layer = self.model.model.get_submodule(name)
        linear = Linear(linear_weight(layer).float(), _bias(layer), pattern)
        stored = weights[self.model.stored_name(name + ".weight")].dtype
        try:
            pruned = prune_linear(method.solver, linear, moments, goal, method.damping, stored)
        except FloatingPointError as error:
            raise FloatingPointError(f"'{name}': {error}") from None
        self._store(name, pruned.layer.weight, pruned.layer.bias, weights)
        return _report(name, pruned, time.monotonic() - start)

    def _store(self, name: str, sparse: Tensor, bias: Tensor | None, weights: dict[str, Tensor]) -> None:
        """Put a pruned layer, in the dtype of the files, where the model runs it and where it is saved."""
        layer = self.model.model.get_submodule(name)
        weight = linear_weight(layer)
        weight.copy_(sparse)
        weights[self.model.stored_name(name + ".weight")] = (
            sparse if weight is layer.weight else sparse.T
        ).cpu()
        if bias is not None:
            layer.get_parameter("bias").copy_(bias)
            weights[self.model.stored_name(name + ".bias")] = bias.cpu()


def _bias(layer: nn.Module) -> Tensor | None:
    return layer.bias.float() if isinstance(layer.bias, Tensor) else None


def _report(name: str, pruned: Pruned, seconds: float) -> LayerReport:
    weight = pruned.layer.weight
    return LayerReport(
        name=name,
        pattern=str(pruned.layer.pattern),
        sparsity=int((weight == 0).sum()) / weight.numel(),
        weights=weight.numel(),
        error=pruned.error,
        seconds=round(seconds, 4),
        objective=list(pruned.objective),
    )


@contextmanager
def _progress_bar(layers: int, *, shown: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[error]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("pruning", total=layers, error="")

        def advance(name: str, error: float | None) -> None:
            bar.update(task, advance=1, description=name, error="" if error is None else f"error {error:.4f}")

        yield advance
