"""What `plan` says of a run, and the table of it that people read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from secateurs.planning.work import Kind, Phase

LONG = 3600.0
"""Seconds that are worth a warning."""


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
    """Of the pruned model's files; with recovery also of what it becomes and of checkpoints meanwhile."""
    compressed_bytes: int
    """Of what `secateurs compress` makes of the result, at most."""
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
    yield "once compressed", _size(plan.compressed_bytes)


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
