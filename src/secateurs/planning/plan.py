"""A run of `prune` before it is run: what it needs of memory, disk and time, from a configuration alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from secateurs.anatomy import anatomy_of, skeleton
from secateurs.checkpoint import Checkpoint, resolve
from secateurs.checkpoint.config import read_config
from secateurs.device import multiplies_bfloat16, resolve_device
from secateurs.planning.machine import CARDS, Machine, card, measured
from secateurs.planning.memory import BlockMemory
from secateurs.planning.work import FLOPS, Amounts, BlockWork, Kind, Phase, Text
from secateurs.pruning.block.joint import Joint, Target
from secateurs.pruning.block.local import Local, Sequential
from secateurs.pruning.methods import Method
from secateurs.pruning.settings import Effort, PruneSettings
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

LONG = 3600.0
"""Seconds that are worth a warning."""

SETTINGS = (
    "method",
    "pattern",
    "effort",
    "target",
    "refine",
    "sequential",
    "samples",
    "length",
    "batch_size",
)
"""That `prune` has, too."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Say what a run of `prune` will take of memory, disk and time, from the model's config.json alone.

    Example: secateurs plan my-llama --device h100 --method sparsellm --samples 128
    """

    device: str | None = None
    """cpu or cuda, which are tested for a second; or a card that need not be here, by what its maker
    publishes: a100, h100, h200, rtx4090, l40s. By default a GPU if there is one."""

    ranks: int = 1
    """Processes that share the run, each with a device of its own."""

    method: str | Method = "sparsellm"
    """As `prune` takes it, and so all that follows."""

    pattern: str = "50%"
    """A share of zeros, or n:m."""

    effort: Effort = "default"
    """fast, default or best."""

    target: Target | None = None
    """layer, block or dense."""

    refine: int | None = None
    """Passes of the descent."""

    sequential: Sequential | None = None
    """block, sublayer or linear."""

    samples: int = 128
    """Calibration sequences."""

    length: int | None = None
    """Tokens in each. By default as many as the model was made for, at most 2048."""

    batch_size: int | None = None
    """Sequences run at once. By default 2048 tokens' worth."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit, as `prune` does."""
        if self.card is None and self.device is not None and not self.device.startswith(("cpu", "cuda")):
            raise ValueError(f"'{self.device}' is no device: use cpu, cuda, or a card: {', '.join(CARDS)}")
        if not isinstance(self.ranks, int) or self.ranks < 1:
            raise ValueError(f"ranks are a number of processes, not {self.ranks}")
        if self.samples < self.ranks:
            raise ValueError(f"{self.samples} samples do not go round {self.ranks} ranks: give one for each")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length is a number of tokens, not {self.length}")
        self.of_prune(self.length or 1)

    @property
    def card(self) -> str | None:
        """The name of a card that need not be here."""
        name = (self.device or "").lower().replace(" ", "").replace("-", "")
        return name if name in CARDS else None

    def of_prune(self, length: int) -> PruneSettings:
        """What `prune` would be told, for sequences of so many tokens."""
        given = {name: getattr(self, name) for name in SETTINGS}
        device = "cpu" if self.card else self.device
        text = None if self.method == "magnitude" else "text"
        given |= {"length": length} if text else {}
        if text is None:
            for name in ("samples", "length", "batch_size", "sequential"):
                given.pop(name)
        settings = PruneSettings(output="", calibration=text, device=device, **given)
        return settings.resolved(self.samples, length)


@dataclass(frozen=True)
class Plan:
    """What a run of `prune` will take."""

    model: str
    machine: str
    is_gpu: bool
    is_measured: bool
    """Whether the machine was tested, and not looked up."""
    settings: dict[str, Any]
    blocks: int
    parameters: int
    """Of the model."""
    pruned: int
    """Of these, those in matrices that are pruned."""
    tokens: int
    """Of calibration."""
    seconds: dict[Phase, float]
    flops: dict[Kind, float]
    """Of all ranks' busiest."""
    host_bytes: int
    """Of memory that a process takes at its peak, beside what importing the library takes."""
    device_bytes: int
    """Of a card's memory; 0 without one."""
    activations_on: str
    """Where the calibration text's activations are kept: device or host."""
    disk_bytes: int
    """Of the pruned model's files."""
    memory: int
    """Of the device, in bytes."""
    host_memory: int | None
    """Of the host, in bytes; None where the card is looked up, whose host is not known."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """Whether memory holds what the run takes of it: the device's, and of the host what one process does,
        as far as the host is known."""
        return not self._short

    @property
    def _short(self) -> list[tuple[int, str, int]]:
        """Memories that are too small: bytes needed, whose, and bytes there."""
        each = [(self.host_bytes, "the host", self.host_memory)]
        if self.is_gpu:
            each.insert(0, (self.device_bytes, self.machine, self.memory))
        return [(needed, whose, there) for needed, whose, there in each if there and needed > there]

    @property
    def warnings(self) -> list[str]:
        """What should be known before the run begins."""
        told = []
        for needed, whose, there in self._short:
            told.append(
                f"{_size(needed)} are needed, {whose} has {_size(there)}: fewer or shorter samples and more "
                "ranks hold less text, sparsegpt less of a matrix, and refine 0 no optimiser"
            )
        if self.total_seconds > LONG:
            told.append(
                f"this takes {_time(self.total_seconds)}: effort fast, method sparsegpt, fewer samples and "
                "more ranks take less"
            )
        return told


@takes(PlanSettings)
def plan(model: str | Path, *, settings: PlanSettings) -> Plan:
    """Say what a run of `prune` will take, before it takes it.

    Nothing of the weights is read: a folder with a config.json alone will do.

    Args:
        model: a model folder, a .gguf file, or a name on the hub, of which only config.json is fetched.

    Raises:
        ValueError: a mistake in the settings or the configuration.
    """
    config = read_config(Checkpoint(resolve(model, weights=False), weights=False))
    text_config: Any = config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    length = settings.length or min(limit or 2048, 2048)
    if limit is not None and length > limit:
        raise ValueError(f"length {length} is more than the {limit} positions that the model was made for")
    pruning = settings.of_prune(length)
    named: Any = config.dtype
    dtype: torch.dtype = text_config.dtype or named or torch.float32
    machine = card(settings.card, dtype) if settings.card else measured(settings.device, dtype)
    samples = 0 if pruning.calibration is None else math.ceil(settings.samples / settings.ranks)
    text = Text(samples, length, settings.batch_size or max(1, 2048 // length))
    anatomy = anatomy_of(config)
    for number, block in enumerate(anatomy.blocks):
        for matrix in block.matrices.values():
            pruning.wanted.check_width(f"{anatomy.path}.{number}.{matrix.name}", matrix.shape[1])
    pruner = pruning.pruner
    assert isinstance(pruner, Joint | Local)
    is_fast = settings.card is not None or multiplies_bfloat16(resolve_device(settings.device))
    low = is_fast and dtype == torch.bfloat16
    blocks = [
        BlockWork(
            block, pruner, pruning.wanted, text, dtype.itemsize, low, not machine.is_gpu, settings.ranks
        )
        for block in anatomy.blocks
    ]
    whole = skeleton(config, dtype)
    sizes = {name: tensor.numel() for name, tensor in whole.named_parameters()}  # a shared one once
    parameters = sum(sizes.values())
    amounts = _amounts(blocks, parameters * dtype.itemsize)
    outside = [size for name, size in sizes.items() if not name.startswith(f"{anatomy.path}.")]
    memory = [BlockMemory(block, text_config.hidden_size) for block in blocks]
    seconds = machine.seconds(amounts)
    seconds["load"] += BEGIN
    seconds["write"] += OF_A_BLOCK * len(blocks)
    host, device, place = _memory(memory, machine, max(outside, default=0) * dtype.itemsize)
    if low and not machine.is_gpu:
        host += OF_A_KERNEL * min(KERNELS, _of_kind(amounts, "shapes") / 3)
    return Plan(
        model=str(model),
        machine=machine.name,
        is_gpu=machine.is_gpu,
        is_measured=settings.card is None,
        settings={name: getattr(pruning, name) for name in SETTINGS} | {"ranks": settings.ranks},
        blocks=len(blocks),
        parameters=parameters,
        pruned=sum(block.weights for block in blocks),
        tokens=samples * settings.ranks * length,
        seconds=seconds,
        flops={kind: _of_kind(amounts, kind) for kind in FLOPS},
        host_bytes=int(host),
        device_bytes=int(device),
        activations_on=place,
        disk_bytes=parameters * dtype.itemsize,
        memory=machine.memory,
        host_memory=None if settings.card else psutil.virtual_memory().total,
    )


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


def table(plan: Plan) -> Table:
    """For people."""
    shown = Table(title=f"{plan.model}: {_count(plan.parameters)} parameters, {plan.blocks} blocks")
    shown.add_column("")
    shown.add_column(plan.machine + ("" if plan.is_measured else ", by published peaks"), justify="right")
    for name, value in _rows(plan):
        shown.add_row(name, value)
    return shown


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "pruned", f"{_count(plan.pruned)} weights"
    if plan.tokens:
        yield "calibration", f"{plan.tokens} tokens"
    yield "FLOPs", f"{sum(plan.flops.values()):.2g}"
    for phase, seconds in plan.seconds.items():
        if seconds:
            yield f"time: {phase}", _time(seconds)
    yield "time", _time(plan.total_seconds)
    if plan.is_gpu:
        yield "memory of the card", f"{_size(plan.device_bytes)} of {_size(plan.memory)}"
        yield "activations are kept", f"on the {plan.activations_on}"
    yield "memory of the host", _size(plan.host_bytes)
    yield "disk", _size(plan.disk_bytes)


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds >= LONG:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"
