"""Walk the blocks of a model: load one, calibrate, prune, write, go on.

Memory holds one block, its second moments and the calibration activations, whatever the depth. The only
state is the weights: a run that finds finished blocks pushes the activations through them and goes on.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from secateurs.anatomy import linear_weight
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint, resolve
from secateurs.device import home_of, resolve_device
from secateurs.pattern import Pattern
from secateurs.pruning.allocation import Allocation, as_pattern, describe_allocation, plan
from secateurs.pruning.magnitude import Magnitude
from secateurs.pruning.measure import Group, measure
from secateurs.pruning.methods import describe_method, parse_method
from secateurs.pruning.report import LayerReport, Report
from secateurs.pruning.sensitivity import Sensitivity
from secateurs.pruning.solver import Solver
from secateurs.pruning.statistics import Statistics
from secateurs.pruning.survey import Survey, layer_shapes
from secateurs.pruning.workfolder import WorkFolder

Sequential = Literal["block", "sublayer", "linear"]
Advance = Callable[[str, float | None], None]
"""Told the name of each layer that is done, and its error if it was pruned now."""

TOKENS_AT_ONCE = 2048


def prune(
    model: str | Path,
    *,
    output: str | Path,
    calibration: str | Path | Tensor | None = None,
    method: str | Solver = "sparsegpt",
    pattern: str | float | Pattern = "50%",
    allocation: Allocation = "uniform",
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    field: str = "text",
    device: str | None = None,
    sequential: Sequential = "block",
    batch_size: int | None = None,
    progress: bool = False,
) -> Report:
    """Prune a pretrained decoder into a new folder that transformers loads.

    Blocks are materialised one at a time and written as they are done. If the run is interrupted, the same
    call continues it; on the same device with the same threads the result has the same bytes.

    Args:
        model: a Hugging Face model folder with safetensors, or a name on the hub. It is only read.
        output: the new folder. Must not exist, unless this same run made it.
        calibration: text on which the layers' inputs are measured (see `secateurs.text`), or token ids
            (samples, length). Only magnitude pruning does without.
        method: a solver, or its name with settings, such as "sparsegpt" or "sparsegpt:damping=0.02".
        pattern: which weights may stay: "70%" (of zeros) or "2:4" (two of every four inputs stay).
        allocation: how the pattern's zeros are shared out between layers: "uniform", "owl" or "sensitivity",
            with settings if need be ("owl:level=layer"). Or one pattern for each layer, whatever `pattern`
            says, by a table, a JSON file or a rule (see `secateurs.pruning.allocation.Allocation`).
        samples: number of calibration sequences.
        length: tokens in each; by default as many as the model was made for, and at most 2048.
        seed: of the calibration sample.
        field: of the calibration rows (jsonl, parquet, dataset) that holds the text.
        device: "cpu", "cuda", "cuda:1"...; by default a GPU where there is one.
        sequential: which pruned layers the inputs of a layer have seen when they are measured: those of
            the blocks before ("block", as published), also this block's attention ("sublayer"), or all
            that come before it ("linear").
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
    where = resolve_device(device)
    checkpoint = Checkpoint(resolve(model))
    if Path(output).resolve() == checkpoint.folder.resolve():
        raise ValueError(f"'{output}' is the model's own folder: give another output folder")
    blockwise = BlockwiseModel(checkpoint, where)
    walk = _Walk(blockwise, solver, sequential)
    budget, shapes = as_pattern(pattern), layer_shapes(blockwise)
    planned = plan(allocation, budget, shapes)
    if calibration is None and isinstance(planned, Sensitivity):
        raise ValueError("an allocation by sensitivity is measured on calibration text: give some")
    tokens = None if calibration is None else _tokens(calibration, blockwise, samples, length, seed, field)
    if tokens is not None:
        batch_size = batch_size or max(1, TOKENS_AT_ONCE // tokens.shape[1])
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


@dataclass(frozen=True)
class _Walk:
    """One pass over the blocks."""

    model: BlockwiseModel
    solver: Solver
    sequential: Sequential

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
                home = home_of(hidden, model.device)
                hidden = [states.to(home) for states in hidden]
        spent = 0.0
        for index in range(len(model.blocks)):
            start = time.monotonic()
            with work.clock("load"):
                finished = work.block(index)
                weights = (
                    finished if finished is not None else model.checkpoint.load(model.block_tensors(index))
                )
            with model.block(index, weights):
                if finished is None:
                    reports = self._prune_block(index, patterns, hidden, weights, work, advance)
                    with work.clock("write"):
                        work.write_block(index, weights, reports, None, time.monotonic() - start)
                    spent += time.monotonic() - start
                else:
                    for name in self._layers(index, model.family.groups):
                        advance(name, None)
                if index + 1 < len(model.blocks):
                    with work.clock("run"):
                        for i, states in enumerate(hidden):
                            hidden[i] = model.run(index, states.to(model.device)).to(home)
        return spent

    def _layers(self, index: int, groups: tuple[Group, ...]) -> list[str]:
        return [f"{self.model.family.blocks}.{index}.{name}" for group in groups for name in group]

    def _prune_block(
        self,
        index: int,
        patterns: dict[str, Pattern | None],
        hidden: list[Tensor],
        weights: dict[str, Tensor],
        work: WorkFolder,
        advance: Advance,
    ) -> list[LayerReport]:
        """Prune a materialised block in place, and so `weights`, its tensors as they will be stored."""
        reports: list[LayerReport] = []
        for stage in self.stages:
            if not any(patterns[name] for name in self._layers(index, stage)):
                for name in self._layers(index, stage):
                    advance(name, None)
                continue
            with work.clock("run"):
                statistics = measure(self.model, index, stage, hidden)
            for group in stage:
                moments = statistics.pop(group)  # freed as soon as its layers are done
                for name in self._layers(index, (group,)):
                    pattern = patterns[name]
                    if pattern is not None:
                        with work.clock("solve"):
                            reports.append(self._prune_layer(name, moments, pattern, weights))
                    advance(name, None if pattern is None else reports[-1].error)
        return reports

    def _prune_layer(
        self, name: str, moments: Statistics, pattern: Pattern, weights: dict[str, Tensor]
    ) -> LayerReport:
        start = time.monotonic()
        stored = self.model.stored_name(name + ".weight")
        layer = self.model.model.get_submodule(name)
        weight = linear_weight(layer)
        dense = weight.float()
        try:
            solution = self.solver.solve(dense, moments, pattern)
        except FloatingPointError as error:
            raise FloatingPointError(f"'{name}': {error}") from None
        # Rounded first, so that what is scored and propagated is what will be stored. -0 + 0 is +0.
        sparse = solution.weight.to(weights[stored].dtype) + 0
        if not sparse.isfinite().all():
            raise FloatingPointError(f"pruning '{name}' gave values that {sparse.dtype} cannot hold")
        lost = moments.error(dense, sparse.float())
        weight.copy_(sparse)  # in float32 it shares its memory with `dense`, which is not needed any more
        weights[stored] = (sparse if weight is layer.weight else sparse.T).cpu()
        return LayerReport(
            name=name,
            pattern=str(pattern),
            sparsity=int((sparse == 0).sum()) / sparse.numel(),
            weights=sparse.numel(),
            error=lost,
            seconds=round(time.monotonic() - start, 4),
            objective=list(solution.objective),
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
