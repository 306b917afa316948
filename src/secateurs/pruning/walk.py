"""Walk the blocks of a model: load one, calibrate, prune, write, go on.

Memory holds one block, its second moments and the calibration activations, whatever the depth. The only
state is the weights: a run that finds finished blocks pushes the activations through them and goes on.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secateurs import ranks
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.calibration.sequences import CalibrationText, calibration_text
from secateurs.checkpoint import Checkpoint, check_place, output_lock, resolve
from secateurs.checkpoint.shards import size_in_bytes
from secateurs.device import home_of, resolve_device
from secateurs.pruning.allocation.fitting import choose_forms, measure_forms
from secateurs.pruning.allocation.plan import describe_allocation, plan
from secateurs.pruning.allocation.room import Room, room_in
from secateurs.pruning.allocation.sensitivity import Sensitivity
from secateurs.pruning.allocation.survey import Allocator, Patterns, Survey, layer_shapes
from secateurs.pruning.block.block import Advance, Block, BlockPruner, Streams
from secateurs.pruning.folder import WorkFolder, begun, check_not_taken, shards_of
from secateurs.pruning.mlp.problem import HELD_OUT
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.reap import Cut, plan_cut
from secateurs.pruning.record import Report
from secateurs.pruning.settings import PruneSettings
from secateurs.pruning.tables import Table, bytes_saved, round_tables, tables_of
from secateurs.recovery.run import check_recovery, recover_folder
from secateurs.settings import takes
from secateurs.values import Values

TOKENS_AT_ONCE = 2048


@takes(PruneSettings)
@ranks.together()
@torch.inference_mode(False)  # in a caller's, nothing has gradients
def prune(model: str | Path, *, settings: PruneSettings, progress: bool = False) -> Report:
    """Prune a pretrained decoder into a new folder that transformers loads.

    Blocks are materialised one at a time and written as they are done. If the run is interrupted, the same
    call continues it; on the same processor with the same threads the result has the same bytes. (On a GPU
    refinement rounds a little differently each time.) Where torchrun or accelerate has started several
    processes, they work on it together.

    Args:
        model: a Hugging Face model folder with safetensors, or a name on the hub. It is only read.
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
    progress = progress and ranks.is_main()
    checkpoint = Checkpoint(resolve(model))
    ranks.from_main(lambda: check_place(Path(settings.output), checkpoint))
    # How many passes of refinement there are may depend on how much text there is.
    known = {name: value for name, value in settings.record().items() if name != "refine"}
    ranks.from_main(lambda: check_not_taken(Path(settings.output), known))
    blockwise = dense = BlockwiseModel(checkpoint, resolve_device(settings.device))
    cut = None
    if settings.share_of_experts < 1:
        cut = plan_cut(dense, settings.share_of_experts)
        blockwise = BlockwiseModel(cut.checkpoint, dense.device)
    shapes = layer_shapes(blockwise)
    tables = [] if settings.grid_of_tables is None else tables_of(blockwise)
    planned: Patterns | Allocator | Room = dict.fromkeys(shapes)
    most = size_in_bytes(settings.max_shard_size)
    if settings.is_bounded:
        planned = _room(blockwise, settings, tables, most)
    elif not settings.leaves_layers:
        planned = plan(settings.allocation, settings.wanted, shapes, rounded=settings.grid is not None)
    if settings.calibration is None and isinstance(planned, Sensitivity):
        raise ValueError("an allocation by sensitivity is measured on calibration text: give some")
    text = _calibration(settings, dense, progress)
    batch_size = _batch_size(settings, text)
    if text is not None:
        settings = settings.resolved(text.samples, text.length)
        ranks.check_share(text.samples)
    run = {
        "model": str(model),
        "allocation": "budget"
        if isinstance(planned, Room)
        else describe_allocation(planned, settings.wanted),
        "calibration": text and text.record,
        "batch_size": batch_size,
        "device": blockwise.device.type,
        **settings.record(),
    }
    if text and text.form and not ranks.from_main(lambda: begun(Path(settings.output))):
        text.check_room()
    with ExitStack() as stack:
        ranks.from_main(lambda: stack.enter_context(output_lock(Path(settings.output))))
        work = WorkFolder(Path(settings.output), blockwise, run, most=most, recover=settings.recover)
        if work.finished:
            return Report.read(work.output)
        if not work.pruned:
            if settings.recover:  # what would stop it is to be found before the work
                check_recovery(settings.recovery(model, work.recovered), checkpoint)
            with work.clock("write"):
                work.write_outside()
            tokens = None if text is None else work.calibration(text, progress)
            if cut is not None:
                assert tokens is not None
                _choose(cut, tokens, batch_size, work, progress)
            if settings.leaves_layers and not work.rounds_tables:
                tokens = None  # there is nothing more to be seen of them
            patterns, grids = _allocate(blockwise, planned, settings, tokens, batch_size, work, progress)
            with _progress_bar(len(patterns), shown=progress) as advance:
                shared = None if tokens is None else ranks.share_of(tokens)
                in_blocks, last = _walk(
                    blockwise, settings.pruner, patterns, grids, shared, batch_size, work, advance
                )
            if work.rounds_tables:
                assert settings.grid_of_tables is not None
                with work.clock("solve"):
                    work.tables(partial(round_tables, blockwise, tables, settings.grid_of_tables, last))
            ranks.from_main(lambda: work.complete(time.monotonic() - start - in_blocks, grids))
        if not settings.recover:
            return ranks.from_main(lambda: work.release(work.model))
        recovery = settings.recovery(model, work.recovered)
        pruned = Checkpoint(work.model)
        with ranks.alone():  # the Trainer has its own way to share work out
            recover_folder(pruned, recovery, model=str(model), progress=progress, run=work.asked)
        ranks.meet()  # all have read what is there
        return ranks.from_main(lambda: work.release(work.recovered))


def _calibration(settings: PruneSettings, model: BlockwiseModel, progress: bool) -> CalibrationText | None:
    """What to calibrate on, enough of it for the method."""
    if settings.calibration is None:
        return None
    text = calibration_text(
        settings.calibration,
        model.checkpoint,
        model.config,
        model.device,
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        field=settings.field,
        bos=settings.asked_bos,
        progress=progress,
    )
    if settings.leaves_layers:
        return text
    tokens = text.samples * text.length
    iterates = isinstance(settings.solver, SparseLLM) and settings.solver.rounds
    if iterates and tokens < HELD_OUT:
        raise ValueError(
            f"{tokens} calibration tokens are too few for SparseLLM's iterations: give {HELD_OUT} or more, "
            "or leave the effort at default"
        )
    return text


def _batch_size(settings: PruneSettings, text: CalibrationText | None) -> int | None:
    if text is None:
        return settings.batch_size
    return settings.batch_size or max(1, TOKENS_AT_ONCE // text.length)


def _choose(cut: Cut, tokens: Tensor, batch_size: int | None, work: WorkFolder, progress: bool) -> None:
    """Choose the experts that are kept, by the dense model."""
    with _progress_bar(max(cut.homes) + 1, shown=progress) as advance:
        cut.keep(work.choice(lambda: cut.choose(tokens, batch_size or 1, advance)))


def _room(model: BlockwiseModel, settings: PruneSettings, tables: list[Table], most: int) -> Room:
    """What a budget leaves for the matrices; ValueError where that is too little, or all that they take."""
    grid = settings.grid_of_tables
    saved = 0 if grid is None else bytes_saved(model, tables, grid)
    room = room_in(
        model,
        shards_of(model, Path(), most).bytes - saved,
        budget=None if settings.budget is None else size_in_bytes(settings.budget),
        bytes_per_weight=settings.bytes_per_weight,
    )
    room.check()
    return room


def _allocate(
    model: BlockwiseModel,
    planned: Patterns | Allocator | Room,
    settings: PruneSettings,
    tokens: Tensor | None,
    batch_size: int | None,
    work: WorkFolder,
    progress: bool,
) -> tuple[Patterns, dict[str, Values]]:
    """Each layer's pattern, by a survey of the dense model if the plan takes one; and the grids of those that
    are rounded."""
    names = layer_shapes(model)
    grids = {} if settings.grid is None else dict.fromkeys(names, settings.grid)
    if isinstance(planned, dict):
        return planned, grids
    with _progress_bar(len(names), shown=progress) as advance:
        survey = Survey(model, tokens, batch_size or 1, lambda name: advance(f"survey of {name}", None))
        if not isinstance(planned, Room):
            return work.allocation(lambda: planned.allocate(survey, settings.wanted)), grids
        forms = work.forms(lambda: choose_forms(planned, measure_forms(survey, planned))).forms
    return {name: forms[name].pattern for name in names}, {
        name: form.values for name, form in forms.items() if form.values is not None
    }


def _walk(
    model: BlockwiseModel,
    pruner: BlockPruner,
    patterns: Patterns,
    grids: Mapping[str, Values],
    tokens: Tensor | None,
    batch_size: int | None,
    work: WorkFolder,
    advance: Advance,
) -> tuple[float, list[Batch]]:
    """Prune every block that is not done yet.

    Returns:
        The seconds spent on them; and the pruned stream before the last block, or if the head is still to be
        rounded, after it.
    """
    hidden: list[Batch] = []
    if tokens is not None:
        with work.clock("run"):
            hidden = model.embed(tokens, batch_size=batch_size or 1, head=pruner.head)
            home = home_of([batch.states for batch in hidden], model.device, copies=pruner.copies(model))
            for batch in hidden:
                batch.states = batch.states.to(home)
    streams = Streams(
        hidden, [replace(batch, shared={}) for batch in hidden] if pruner.follows_dense else None
    )

    def push(index: int, stream: list[Batch]) -> None:
        """Replace the input of a materialised block by its result."""
        with work.clock("run"):
            for batch in stream:
                model.push(index, batch)

    spent = 0.0
    for index in range(len(model.blocks)):
        start = time.monotonic()
        more = index + 1 < len(model.blocks) or work.rounds_tables
        with work.clock("load"):
            finished = work.block(index)
            dense = finished is None or (more and streams.dense is not None)
            parameters = model.parameters_of(index) if dense else {}
        if finished is None:
            with model.block(index, parameters):
                block = Block(model, index, patterns, parameters, grids=grids)
                report = pruner.prune(block, streams, work.clock, advance)
                with work.clock("write"):
                    work.write_block(index, parameters, report, time.monotonic() - start, block.scales)
                spent += time.monotonic() - start
                if more:
                    push(index, streams.pruned)
        elif more:
            if streams.dense is not None:
                with model.block(index, parameters):
                    push(index, streams.dense)
            with model.block(index, model.parameters_of(index, finished)):
                push(index, streams.pruned)
        if finished is not None:
            for name in patterns:
                if name.startswith(f"{model.path}.{index}."):
                    advance(name, None)
    return spent, streams.pruned


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
