"""How fast a machine is at what a run computes: measured here, or of a card by what its maker publishes."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, get_args

import psutil
import torch
from torch.nn.functional import linear, silu
from torch.nn.functional import scaled_dot_product_attention as attend

from secateurs.calibration.written import drawn
from secateurs.device import resolve_device
from secateurs.pattern import NM, Unstructured
from secateurs.planning.work import Amounts, Kind, Phase
from secateurs.pruning.solvers.rounding import Rounding, kernel_for
from secateurs.pruning.solvers.sparsegpt import sweep_for
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.values import Values

SIZE = 1024
"""Of the matrices of the self-test."""

DISK = 1.4e9
"""Bytes a second, assumed everywhere: what was written in the runs that `Efficiency` is from."""

SECONDS = 0.1
"""That each part of the self-test takes, about; at least three times it is done."""


@dataclass(frozen=True)
class Machine:
    """What computes."""

    name: str
    is_gpu: bool
    memory: int
    """Bytes of what it computes in: of the card, or the host's."""
    rates: Mapping[Kind, float]
    """Of each kind of work, amounts a second."""

    def seconds(self, amounts: Amounts) -> dict[Phase, float]:
        """What work takes, by phase, in their order."""
        spent: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)
        for (phase, kind), amount in amounts.items():
            spent[phase] += amount / self.rates[kind]
        return spent


class Card(NamedTuple):
    """A GPU's peaks as NVIDIA's data sheets have them; products without sparsity, summed in float32."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second."""
    bfloat16: float
    """FLOPs a second of its tensor cores."""
    float32: float
    """FLOPs a second outside of them: torch leaves TF32 off."""


CARDS = {
    "a100": Card("NVIDIA A100 80GB SXM", 80e9, 2.039e12, 312e12, 19.5e12),
    "h100": Card("NVIDIA H100 SXM", 80e9, 3.35e12, 989e12, 67e12),
    "h200": Card("NVIDIA H200", 141e9, 4.8e12, 989e12, 67e12),
    "rtx4090": Card("NVIDIA RTX 4090", 24e9, 1.008e12, 165e12, 82.6e12),
    "l40s": Card("NVIDIA L40S", 48e9, 0.864e12, 362e12, 91.6e12),
}
"""By the names that a plan takes them by."""


class Efficiency(NamedTuple):
    """What of a card's peaks a run reaches. From SparseGPT and ADMM on one H200, and products alone
    (benchmarks/results/gpu_prune.json); taken to be the same on others."""

    bfloat16: float = 0.74
    """Of products of 8192 x 8192 matrices."""
    float32: float = 0.76
    """The same in float32."""
    factors: float = 0.3
    """Factorisations, of the peak in float32."""
    moved: float = 0.6
    """Elementwise work, of the bandwidth."""
    bytes_ranked: float = 2100.0
    """What finding a threshold takes for each weight, as bytes of the bandwidth."""
    bytes_rounded: float = 4000.0
    """What rounding takes for each weight, as bytes of the bandwidth: a guess, no run was measured."""
    bytes_drawn: float = 60.0
    """What drawing a token takes for each logit, as bytes of the bandwidth: another guess."""
    bytes_swept: float = 60.0
    """What SparseGPT's inner loop takes for each FLOP, as bytes of the bandwidth."""
    calls: float = 1e5
    """Kernels a second that Python starts."""


def card(name: str, dtype: torch.dtype) -> Machine:
    """A card by name.

    Args:
        name: one of `CARDS`.
        dtype: that the model runs in.
    """
    of, share = CARDS[name], Efficiency()
    float32 = share.float32 * of.float32
    products = float32 if dtype == torch.float32 else share.bfloat16 * of.bfloat16
    return Machine(
        of.name,
        True,
        int(of.memory),
        {
            "products": products,
            "attention": products,
            "sums": products,
            "float32": float32,
            "factors": share.factors * of.float32,
            "sweep": of.bandwidth / share.bytes_swept,
            "ranked": of.bandwidth / share.bytes_ranked,
            "rounded": of.bandwidth / share.bytes_rounded,
            "passed": share.moved * of.bandwidth / (3 * dtype.itemsize),  # two read and one written, say
            "moved": share.moved * of.bandwidth,
            "calls": share.calls,
            "shapes": math.inf,
            "recalled": share.moved * of.bandwidth / dtype.itemsize,
            "drawn": of.bandwidth / share.bytes_drawn,
            "python": 1.0,
            "disk": DISK,
        },
    )


@torch.no_grad()
def measured(device: str | None, dtype: torch.dtype) -> Machine:
    """This machine, tested for about a second with the threads that torch has.

    Args:
        device: as `prune` takes it.
        dtype: that the model runs in.
    """
    where = resolve_device(device)
    tokens = torch.randn(2 * SIZE, SIZE, device=where)
    matrix, small = tokens[:SIZE].clone(), torch.zeros(8, device=where)
    low, stream = matrix.to(dtype), tokens.to(dtype)
    moments = Statistics(SIZE, device=where)
    moments.update(tokens)
    definite = moments.moment + torch.eye(SIZE, device=where)
    block, corner = matrix[:128].clone(), torch.eye(128, device=where)
    sweep, sums = sweep_for(matrix), Statistics(SIZE, device=where)
    large = torch.ones(3, 2 * SIZE, SIZE, device=where)
    sizes = itertools.count(17)
    heads = stream.view(1, 32, SIZE, 64)[:, :16, : SIZE // 2]
    chances = torch.rand(16, 4 * SIZE, device=where)
    work: dict[Kind, tuple[float, Callable[[], object]]] = {
        "products": (4 * SIZE**3, lambda: linear(stream, low)),
        "attention": (
            SIZE**3 // 2,
            lambda: attend(heads, heads, heads, is_causal=True),
        ),
        "sums": (_of_moment(where) * 2 * SIZE**2, lambda: sums.update(stream)),
        "float32": (2 * SIZE**3, lambda: matrix @ matrix),
        "factors": (SIZE**3, lambda: torch.cholesky_inverse(torch.linalg.cholesky(definite))),
        "sweep": (128 * 128 * SIZE, lambda: sweep(block, corner, NM(2, 4))),
        "ranked": (SIZE**2, lambda: Unstructured(0.5).keep(matrix)),
        "rounded": (64 * SIZE, lambda: _round(matrix[:64])),
        "passed": (2 * tokens.numel(), lambda: silu(stream) * stream),
        "moved": (4 * 4 * large[0].numel(), lambda: large[0].addcmul_(large[1], large[2])),
        "calls": (1, lambda: small.add_(1)),
        "shapes": (1, lambda: linear(low[: next(sizes), :64], low[:64, :64])),
        "recalled": (SIZE**2, lambda: attend(heads[:, :, :1], heads, heads)),
        "drawn": (chances.numel(), lambda: drawn(chances.softmax(-1))),
    }
    rates: dict[Kind, float] = {kind: amount / _shortest(run, where) for kind, (amount, run) in work.items()}
    if where.type == "cuda":
        name, memory = torch.cuda.get_device_name(where), torch.cuda.get_device_properties(where).total_memory
    else:
        name, memory = f"this machine, threads {torch.get_num_threads()}", psutil.virtual_memory().total
    return Machine(name, where.type == "cuda", memory, rates | {"python": 1.0, "disk": DISK})


def _round(columns: torch.Tensor) -> None:
    """What `Rounding` does to a group of columns by itself."""
    kernel, keep, values = kernel_for(columns), torch.ones_like(columns, dtype=torch.bool), Values(4)
    push, after = torch.zeros(len(columns), len(columns), device=columns.device), columns.clone()
    scale = kernel.choose_scales(columns, keep, torch.ones_like(columns[:, 0]), values)
    for _ in range(1 + Rounding.passes):
        kernel.settle(after, columns, keep, scale, push, values)


def _of_moment(device: torch.device) -> float:
    """Columns of a second moment that are computed for each of its rows, on average."""
    return 2.0 * SIZE if device.type == "cuda" else SIZE + 256.0


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a run takes where nothing comes between: on a processor its own seconds over its threads,
    which are those of a quiet machine, whatever else is running."""
    clock, threads = (
        (time.perf_counter, 1) if device.type == "cuda" else (time.process_time, torch.get_num_threads())
    )
    times: list[float] = []
    while len(times) < 4 or sum(times) < SECONDS * threads:
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return statistics.median(times[1:]) / threads
