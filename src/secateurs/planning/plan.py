"""A run of `prune` before it is run: what it needs of memory, disk and time, from a configuration alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from secateurs.anatomy import BlockAnatomy, anatomy_of, skeleton
from secateurs.checkpoint import Checkpoint, resolve
from secateurs.checkpoint.config import read_config
from secateurs.checkpoint.shards import size_in_bytes
from secateurs.device import multiplies_bfloat16, resolve_device
from secateurs.pattern import Unstructured
from secateurs.planning.compressed import bytes_of_budget, matrices_packed, table_packed, tables_of
from secateurs.planning.machine import Machine, card, measured
from secateurs.planning.memory import BlockMemory
from secateurs.planning.phases import (
    SAVED,
    Cost,
    Whole,
    experts_scored,
    forms_measured,
    recovered,
    surveyed,
    tables_rounded,
    written,
)
from secateurs.planning.report import Plan
from secateurs.planning.settings import PlanSettings
from secateurs.planning.work import FLOPS, Amounts, BlockWork, Kind, Text, sum_of
from secateurs.pruning.allocation.forms import Form
from secateurs.pruning.allocation.plan import plan as patterns_or_allocator
from secateurs.pruning.allocation.sensitivity import Sensitivity
from secateurs.pruning.allocation.survey import Allocator
from secateurs.pruning.reap import cut_in_numbers
from secateurs.pruning.walk import TOKENS_AT_ONCE
from secateurs.recovery.settings import STEP_TOKENS
from secateurs.settings import takes

BASE, BLOCK = 40e6, 0.25e6
"""Bytes that a process comes to hold beside what the imports do, whatever the model: mostly its libraries'
code, which is read from disk as it is first used; and for each block, its modules and its record."""

HEAP = 1.3
"""Bytes that a processor's allocator (glibc's) holds for each in use at the peak: what lies free between
others it keeps, since giving every large buffer back at once would take more time."""

BEGIN, OF_A_BLOCK = 0.2, 0.05
"""Seconds of Python and small files in a run and for each block, whatever is in it; of narrow models."""

KERNELS, OF_A_KERNEL = 1024, 1.1e6
"""How many kernels for products of one shape a processor's library (oneDNN) keeps, and the bytes of one. Each
is used about three times: tokens are routed alike when a batch passes again."""

ROOM = 0.5
"""Of a card's memory, what activations may take: else they are kept in the host's."""


@takes(PlanSettings)
def plan(model: str | Path, *, settings: PlanSettings) -> Plan:
    """Say what a run of `prune` will take, before it takes it.

    Nothing of the weights is read: a folder with a config.json alone will do.

    Args:
        model: a model folder, a .gguf file, or a name on the hub, of which only config.json is fetched.

    Raises:
        ValueError: a mistake in the settings or the configuration.
    """
    checkpoint = Checkpoint(resolve(model, weights=False), weights=False)
    config = dense = read_config(checkpoint)
    if settings.share_of_experts < 1:
        _, fewer = cut_in_numbers(checkpoint, config, settings.share_of_experts)
        config = read_config(fewer)
    text_config: Any = config.get_text_config(decoder=True)
    samples, length = _shape(settings, getattr(text_config, "max_position_embeddings", None))
    settings = settings.resolved(samples, length)
    named: Any = config.dtype
    dtype: torch.dtype = text_config.dtype or named or torch.float32
    machine = card(settings.card, dtype) if settings.card else measured(settings.device, dtype)
    batch_size = settings.batch_size or max(1, TOKENS_AT_ONCE // length)
    text = Text(samples if settings.calibration is not None else 0, length, batch_size)
    own = replace(text, samples=math.ceil(text.samples / settings.ranks))
    anatomy = anatomy_of(config)
    shapes = {
        f"{anatomy.path}.{number}.{matrix.name}": matrix.shape
        for number, block in enumerate(anatomy.blocks)
        for matrix in block.matrices.values()
    }
    allocator = _allocator(settings, shapes)
    is_fast = settings.card is not None or multiplies_bfloat16(resolve_device(settings.device))
    low = is_fast and dtype == torch.bfloat16
    # What a budget chooses is not known; half of the weights at 4 bits are not far from it.
    pattern = Unstructured(0.5) if settings.is_bounded else settings.wanted
    blocks = [
        BlockWork(
            block, settings.pruner, pattern, own, dtype.itemsize, low, not machine.is_gpu, settings.ranks
        )
        for block in anatomy.blocks
    ]
    whole = skeleton(config, dtype)
    sizes = {name: tensor.numel() for name, tensor in whole.named_parameters()}  # a shared one once
    parameters = sum(sizes.values())
    outside = [size for name, size in sizes.items() if not name.startswith(f"{anatomy.path}.")]
    tables = tables_of(whole)
    if settings.grid_of_tables is not None and not tables:
        raise ValueError(
            f"neither the embedding of '{model}' nor its head can be packed: leave embedding out"
        )

    def seen(all_blocks: Sequence[BlockAnatomy], weights: int) -> Whole:
        """A model by one process that has all of the text."""
        alone = [replace(blocks[0], anatomy=block, text=text, ranks=1) for block in all_blocks]
        return Whole(alone, weights, text_config.vocab_size, text_config.hidden_size, len(tables))

    pruned = seen(anatomy.blocks, parameters)
    before = pruned
    if config is not dense:
        uncut = sum(tensor.numel() for tensor in skeleton(dense, dtype).parameters())
        before = seen(anatomy_of(dense).blocks, uncut)
    costs = list(_costs(settings, before, pruned, text, allocator, low=low))
    amounts = _amounts([] if settings.leaves_layers else blocks, pruned.bytes)
    if settings.leaves_layers and settings.grid_of_tables is not None:
        amounts.add(sum_of(block.pushed() for block in blocks[:-1]))
    amounts.add(sum_of(cost.amounts for cost in costs))
    amounts["load", "python"] += BEGIN
    amounts["write", "python"] += OF_A_BLOCK * len(blocks)
    seconds = machine.seconds(amounts)
    memory = [BlockMemory(block, text_config.hidden_size) for block in blocks]
    host, device, place = _memory(memory, machine, max(outside, default=0) * dtype.itemsize)
    if low and not machine.is_gpu:
        host += OF_A_KERNEL * min(KERNELS, _of_kind(amounts, "shapes") / 3)
    if machine.is_gpu:
        device = max(device, *(cost.stays + cost.passes for cost in costs), 0.0)
    else:
        held = max((cost.stays + HEAP * cost.passes for cost in costs), default=0.0)
        host = max(host, BASE + BLOCK * len(blocks) + held)
    disk = pruned.bytes
    if settings.recover:
        disk += pruned.bytes + SAVED * 12 * parameters
    return Plan(
        model=str(model),
        machine=machine.name,
        is_gpu=machine.is_gpu,
        is_measured=settings.card is None,
        settings=settings.record() | {"samples": samples, "length": length, "ranks": settings.ranks},
        blocks=len(blocks),
        parameters=parameters,
        pruned=0 if settings.leaves_layers else sum(block.weights for block in blocks),
        tokens=own.samples * settings.ranks * length,
        seconds=seconds,
        flops={kind: _of_kind(amounts, kind) for kind in FLOPS},
        host_bytes=int(host),
        device_bytes=int(device),
        activations_on=place,
        disk_bytes=int(disk),
        compressed_bytes=_compressed(settings, anatomy.blocks, tables, parameters, dtype),
        memory=machine.memory,
        host_memory=None if settings.card else psutil.virtual_memory().total,
    )


def _shape(settings: PlanSettings, limit: int | None) -> tuple[int, int]:
    """(samples, length) of the calibration text."""
    if isinstance(settings.calibration, Tensor):
        samples, length = settings.calibration.shape
        return samples, length
    length = settings.length or min(limit or 2048, 2048)
    if limit is not None and length > limit:
        raise ValueError(f"length {length} is more than the {limit} positions that the model was made for")
    return settings.samples, length


def _allocator(settings: PlanSettings, shapes: Mapping[str, tuple[int, int]]) -> Allocator | None:
    """What looks at the dense model first, if anything does."""
    if settings.is_bounded or settings.leaves_layers:
        return None
    planned = patterns_or_allocator(
        settings.allocation, settings.wanted, shapes, rounded=settings.grid is not None
    )
    if isinstance(planned, Sensitivity) and settings.calibration is None:
        raise ValueError("an allocation by sensitivity is measured on calibration text: give some")
    return None if isinstance(planned, dict) else planned


def _costs(
    settings: PlanSettings,
    before: Whole,
    pruned: Whole,
    text: Text,
    allocator: Allocator | None,
    *,
    low: bool,
) -> Iterator[Cost]:
    """Of what is done beside the walk.

    Args:
        settings: of the run.
        before: the model with all experts.
        pruned: the model with those that are kept.
        text: for calibration.
        allocator: that looks at the model first.
        low: see `BlockWork`.
    """
    if count := settings.written(text.samples):
        yield written(before, replace(text, samples=count))
    if settings.share_of_experts < 1:
        yield experts_scored(before)
    if settings.is_bounded:
        yield forms_measured(pruned)
    elif allocator is not None:
        yield surveyed(pruned, allocator)
    if settings.grid_of_tables is not None:
        yield tables_rounded(pruned, replace(text, samples=math.ceil(text.samples / settings.ranks)))
    if settings.recover:
        told = settings.recovery("", "")
        length = text.length
        several = text.samples if isinstance(settings.calibration, Tensor) else told.sequences(length)
        each = max(1, STEP_TOKENS // length // settings.ranks)
        trained = Text(several, length, settings.ranks * each)
        if count := settings.written(several):
            yield written(before, replace(trained, samples=count))
        # The dense model has all experts.
        more = (before.parameters - pruned.parameters) * before.dtype_bytes
        on_grid = settings.rounds or settings.is_bounded
        cost = recovered(pruned, settings.recover, trained, low=low, ranks=settings.ranks, on_grid=on_grid)
        yield cost._replace(stays=cost.stays + more)


def _compressed(
    settings: PlanSettings,
    blocks: Sequence[BlockAnatomy],
    tables: Sequence[tuple[int, int]],
    parameters: int,
    dtype: torch.dtype,
) -> int:
    """Bytes of what `compress` makes of the result, at most; of a budget what was asked for."""
    weights = sum(prod(matrix.shape) for block in blocks for matrix in block.matrices.values())
    rest = (parameters - weights) * dtype.itemsize
    if (grid := settings.grid_of_tables) is not None:
        rest += sum(table_packed(shape, grid, dtype) - prod(shape) * dtype.itemsize for shape in tables)
    if settings.is_bounded:
        most = None if settings.budget is None else size_in_bytes(settings.budget)
        each = settings.bytes_per_weight
        return bytes_of_budget(blocks, dtype, rest, budget=most, bytes_per_weight=each)
    form = Form(settings.wanted.sparsity, settings.grid)
    return rest + sum(matrices_packed(block, form, dtype) for block in blocks)


def _amounts(blocks: list[BlockWork], model_bytes: float) -> Amounts:
    """Of all blocks: those of one kind are counted once."""
    total = Amounts({("load", "disk"): model_bytes, ("write", "disk"): model_bytes})
    known: dict[int, tuple[Amounts, Amounts]] = {}
    for number, block in enumerate(blocks):
        kind = id(block.anatomy)
        if kind not in known:
            known[kind] = block.amounts, block.pushed()
        of_block, pushed = known[kind]
        total.add(of_block)
        if number + 1 < len(blocks):
            total.add(pushed)
    return total


def _of_kind(amounts: Amounts, kind: Kind) -> float:
    """In all phases."""
    return sum(amount for (_, of), amount in amounts.items() if of == kind)


def _memory(blocks: list[BlockMemory], machine: Machine, widest: float) -> tuple[float, float, str]:
    """Bytes of the host and of the device, and where activations are kept."""
    known = {id(block.work.anatomy): block for block in blocks}.values()
    moments = [(block.parameters, held) for block in known for held in block.moments()]
    activations = max(held.activations for _, held in moments)
    stream = max(block.stream for block in known)
    embedding = 2 * widest + stream
    stored = max(block.parameters for block in known)
    if not machine.is_gpu:
        peak = max(2 * parameters + held.activations + held.work for parameters, held in moments)
        return BASE + BLOCK * len(blocks) + max(embedding, HEAP * peak), 0.0, "host"
    on_device = activations < ROOM * machine.memory
    device = max(
        parameters + held.work + (held.activations if on_device else 0.0) for parameters, held in moments
    )
    host = BASE + BLOCK * len(blocks) + max(2 * widest, 2 * stored + (0.0 if on_device else activations))
    return host, max(device, widest + stream), "device" if on_device else "host"
