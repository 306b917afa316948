"""One matrix times a token or a few on the CPU: codes of a few bits, behind a mask or not, against rivals.

Every contender has as many copies of its matrix as overflow the last-level cache together, and each run
takes the next, so weights come from memory as they do when a whole model decodes. Contenders take turns, in
a new order each round; a ratio is the median over rounds of two times of one round. The bytes are those of a
matrix: what it is bound by in the end.

Rivals: the same zeros in bfloat16 behind a mask, torch's dense bfloat16, torch's own int8 and int4, and with
`--ggml FOLDER` (see ggml.py) llama.cpp's, of which Q4_K is what most people run. Ours and ggml's round
tokens to int8 first, and the time is with it.

    python benchmarks/quantised_cpu.py --ggml build/src
"""

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common import RESULTS, arguments, environment, print_row, print_table, save
from ggml import Ggml
from random_models import packed_weight, sparse_weight
from secateurs.runtime.cpu import cpu_kernels
from secateurs.runtime.format import pack, row_offsets
from secateurs.values import Values
from timing import medians, timed

OURS = [
    *((zeros, bits, group) for zeros in (0.5, 0.7) for bits in (8, 4, 3, 2) for group in (64, 128)),
    *((0.0, bits, group) for bits in (8, 4, 3, 2) for group in (64, 128)),
    (0.5, 4, 32),
]
"""Zeros (without any there is no mask), bits and group."""

RIVALS = [("Q4_0", True), ("Q4_K", False), ("Q4_K", True), ("Q3_K", False), ("Q2_K", True), ("Q8_0", False)]
"""ggml's types, and whether they are rearranged for the CPU."""

CACHE = 48e6
"""Bytes that copies of a matrix take at least."""

Contender = tuple[Callable[[], object], int]
"""One run, and the bytes of weights that it reads."""


def copies(size: int) -> int:
    return max(2, math.ceil(CACHE / size))


def in_cycle(runs: list[Callable[[], object]]) -> Callable[[], object]:
    """Runs one of them after the other, one a call."""
    state = [0]

    def run() -> object:
        state[0] = (state[0] + 1) % len(runs)
        return runs[state[0]]()

    return run


def cloned(packed: Tensor) -> list[Tensor]:
    return [packed.clone() for _ in range(copies(packed.nbytes))]


def ours(shape: tuple[int, int], zeros: float, bits: int, group: int, grid: str, x: Tensor) -> Contender:
    values = Values(bits, group, grid if bits < 8 else "whole")
    rows, columns = shape
    scales = torch.rand(rows, values.groups(columns)).add(0.5).bfloat16()
    weight = values.decode(torch.randint(2**bits, shape, dtype=torch.uint8), scales)
    if zeros:  # a level that is 0 would be one more
        weight = weight.where(weight != 0, values.spread(scales.float(), columns))
        weight = weight.where(torch.rand(shape) >= zeros, 0)
    packed, layout = pack(weight, (values, scales), masked=zeros > 0)
    offsets, kernels = row_offsets("w", packed, layout), cpu_kernels()
    assert kernels is not None, "install a C++ compiler, and secateurs again"
    linear = kernels.linear
    runs = [lambda each=each: linear(x, each, offsets, None, layout) for each in cloned(packed)]
    return in_cycle(runs), packed.nbytes


def torchs(shape: tuple[int, int], zeros: float, x: Tensor) -> dict[str, Contender]:
    """bfloat16 behind a mask, and dense in what torch multiplies by."""
    weight = sparse_weight(shape, zeros, torch.bfloat16)
    packed, offsets, layout = packed_weight(weight)
    kernels, narrow = cpu_kernels(), x.bfloat16()
    assert kernels is not None
    linear = kernels.linear
    masked = [lambda each=each: linear(narrow, each, offsets, None, layout) for each in cloned(packed)]
    dense = [lambda each=each: torch.nn.functional.linear(narrow, each) for each in cloned(weight)]
    found = {
        f"bfloat16, {zeros:.0%} zeros": (in_cycle(masked), packed.nbytes),
        "torch bfloat16": (in_cycle(dense), weight.nbytes),
    }
    codes, scale = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0]).bfloat16()
    bytes_int8 = [lambda each=each: torch._weight_int8pack_mm(narrow, each, scale) for each in cloned(codes)]
    found["torch int8"] = (in_cycle(bytes_int8), codes.nbytes)
    nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(16, shape, dtype=torch.int32), 1
    )
    pairs = torch.rand(shape[1] // 128, shape[0], 2).bfloat16()
    int4 = [
        lambda each=each: torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, each, 128, pairs)
        for each in cloned(nibbles)
    ]
    found["torch int4, groups of 128"] = (in_cycle(int4), nibbles.nbytes + pairs.nbytes)
    return found


def ggmls(folder: Path, threads: int, shape: tuple[int, int], x: Tensor) -> dict[str, Contender]:
    ggml, weight = Ggml(folder, threads), torch.randn(shape).numpy()
    found = {}
    for kind, repacked in RIVALS:
        size = weight.nbytes // 8
        made = ggml.product(kind, weight, x.numpy(), repacked=repacked, copies=copies(size))
        if made is None:
            continue
        products, size = made
        products[0]()
        exact = x.double() @ torch.from_numpy(weight).double().T
        error = (torch.from_numpy(products[0].result()) - exact).norm() / exact.norm()
        assert error < 0.5, f"ggml's {kind} is off by {error:.0%}"
        found[f"ggml {kind}{', rearranged' if repacked else ''}"] = (in_cycle(products), size)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], help="outputs and inputs")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--grid", choices=["whole", "half"], default="whole")
    parser.add_argument("--only", nargs="*", help="such as 50-4-128: zeros, bits and group of ours")
    parser.add_argument("--ggml", type=Path, help="folder of its libraries")
    parser.add_argument("--name", default="quantised_cpu", help="of the raw result")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    random.seed(0)
    shape, x = tuple(settings.shape), torch.randn(settings.tokens, settings.shape[1])
    contenders: dict[str, Contender] = {}
    for zeros, bits, group in OURS:
        if settings.only and f"{100 * zeros:.0f}-{bits}-{group}" not in settings.only:
            continue
        name = f"int{bits}, groups of {group}, {f'{zeros:.0%} zeros' if zeros else 'no mask'}"
        contenders[name] = ours(shape, zeros, bits, group, settings.grid, x)
    contenders |= torchs(shape, 0.5, x)
    if settings.ggml:
        contenders |= ggmls(settings.ggml, settings.threads, shape, x)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    runs = {name: timed(run) for name, (run, _) in contenders.items()}
    for number in range(-3, settings.rounds):
        for name in random.sample([*runs], len(runs)):
            seconds = runs[name]()
            if number >= 0:
                times[name].append(seconds)
    baselines = [name for name in ("torch bfloat16", "ggml Q4_K", "ggml Q4_K, rearranged") if name in times]
    middle = medians(times)
    best = min((name for name in baselines if "Q4_K" in name), key=lambda name: middle[name], default=None)
    against = [f"bfloat16, {0.5:.0%} zeros", "torch bfloat16", *([best] if best else [])]
    print_table(["", "bytes per weight", "ms", *(f"time over {name}" for name in against)], [])
    rows = []
    for name, (_, size) in contenders.items():
        ratios = {
            other: float(torch.tensor(times[name]).div(torch.tensor(times[other])).median())
            for other in against
        }
        per_weight = size / math.prod(shape)
        rows.append(
            {"name": name, "bytes_per_weight": per_weight, "seconds": middle[name], "time_over": ratios}
        )
        print_row([name, per_weight, 1e3 * middle[name], *ratios.values()])
    about = environment() | {**vars(settings), "ggml": settings.ggml is not None}
    save(RESULTS / f"{settings.name}.json", about, rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
