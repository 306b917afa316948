"""Walk the blocks of a model: load one, calibrate, prune, write, go on.

Memory holds one block, its second moments and the calibration activations, whatever the depth. The only
state is the weights: a run that finds finished blocks pushes the activations through them and goes on.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint, resolve
from secateurs.device import home_of, resolve_device
from secateurs.pattern import Pattern
from secateurs.pruning.allocation.plan import Allocation, as_pattern, describe_allocation, plan
from secateurs.pruning.allocation.sensitivity import Sensitivity
from secateurs.pruning.allocation.survey import Patterns, Survey, layer_shapes
from secateurs.pruning.block.block import Advance, Block, BlockPruner, Streams
from secateurs.pruning.block.joint import Joint, Target
from secateurs.pruning.block.local import Local, Sequential
from secateurs.pruning.folder import WorkFolder
from secateurs.pruning.methods import Method, describe_method, parse_method
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.record import Report
from secateurs.pruning.solvers.magnitude import Magnitude

TOKENS_AT_ONCE = 2048

REPAIR = 0.5
"""By default: whether none or all of it is better depends on the text and the sparsity."""

REFINE = 8
"""Passes over the calibration text by default, where there is something to refine towards."""


@torch.inference_mode(False)  # in a caller's, nothing has gradients
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
            says, by a table, a JSON file or a rule (see `secateurs.pruning.allocation.plan.Allocation`).
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
    pruner: BlockPruner
    if isinstance(solver, SparseLLM):
        pruner = Joint(solver, target, repair, refine)
    elif target != "layer":
        pruner = Joint(SparseLLM(solver, iterations=0), target, repair, refine)
    else:
        pruner = Local(solver, sequential)
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
        in_blocks = _walk(blockwise, pruner, patterns, tokens, batch_size or 1, work, advance)
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


def _walk(
    model: BlockwiseModel,
    pruner: BlockPruner,
    patterns: Patterns,
    tokens: Tensor | None,
    batch_size: int,
    work: WorkFolder,
    advance: Advance,
) -> float:
    """Prune every block that is not done yet; returns the seconds spent on them."""
    hidden: list[Tensor] = []
    if tokens is not None:
        with work.clock("run"):
            hidden = model.embed(tokens, batch_size=batch_size)
            home = home_of(hidden, model.device, copies=pruner.copies(model))
            hidden = [states.to(home) for states in hidden]
    streams = Streams(hidden, list(hidden) if pruner.follows_dense else None)

    def push(index: int, stream: list[Tensor]) -> None:
        """Replace the input of a materialised block by its result."""
        with work.clock("run"):
            for i, states in enumerate(stream):
                stream[i] = model.run(index, states.to(model.device)).to(states.device)

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
                block = Block(model, index, patterns, weights)
                report = pruner.prune(block, streams, work.clock, advance)
                with work.clock("write"):
                    work.write_block(index, weights, report, time.monotonic() - start)
                spent += time.monotonic() - start
                if more:
                    push(index, streams.pruned)
        elif more:
            if streams.dense is not None:
                with model.block(index, weights):
                    push(index, streams.dense)
            with model.block(index, finished):
                push(index, streams.pruned)
        if finished is not None:
            for name in patterns:
                if name.startswith(f"{model.family.blocks}.{index}."):
                    advance(name, None)
    return spent


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
