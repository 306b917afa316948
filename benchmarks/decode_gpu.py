"""One token, a few, and prompts through blocks of Llama-2-7B's geometry on a GPU: compressed against cuBLAS.

All sides are captured in CUDA graphs over enough blocks that the weights exceed the second-level cache
several times over, and replayed in turns; medians over rounds, of which ratios are taken within a round. The
bound is a device-to-device copy: what it reads and writes in a second. More than 16 tokens go through
expansion. With --two-of-four, 2:4 weights through torch's tensor cores; with --int4, dense weights of four
bits in groups of 128 by torchao, which is to be there. With --tiles, the kernel for one
token by what a program works on at a time (`secateurs.runtime.gpu.VECTOR`), that for sixteen (`TOGETHER`) and
expansion (`EXPANSION`); first what is used.

    python benchmarks/decode_gpu.py
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from common import RESULTS, Record, arguments, environment, print_row, print_table, save
from random_models import block_shapes, packed_weight, sparse_weight
from secateurs.runtime import gpu
from secateurs.runtime.kernels import sparse_linear
from secateurs.runtime.layout import Layout
from timing import in_turns, medians, speedup, timed

Packed = tuple[Tensor, Tensor, Layout]

TILES = {
    "VECTOR": ((1, 2, 4, 8), (256, 512, 1024, 2048), (1, 4), (1, 2)),
    "TOGETHER": ((16,), (128, 256, 512), (4, 8), (1,)),
    "EXPANSION": ((1, 2, 4, 8), (512, 1024, 2048), (4, 8), (1,)),
}
"""Rows, columns, warps and stages to try."""

TOKENS = {"VECTOR": 1, "TOGETHER": 16, "EXPANSION": 64}
"""To try them with."""

PER_THREAD = range(8, 33)  # weights: with fewer there is too little under way, more do not fit into registers


class Block:
    """Copies of a block's seven layers, dense and packed; each has memory of its own.

    Args:
        shapes: of the layers.
        sparsity: of the weights.
        copies: how many.
        device: where.
    """

    def __init__(
        self, shapes: list[tuple[int, int]], sparsity: float, copies: int, device: torch.device
    ) -> None:
        weights = [sparse_weight(shape, sparsity, torch.bfloat16, device) for shape in shapes]
        packed = [packed_weight(weight) for weight in weights]
        self.dense = [weight.clone() for _ in range(copies) for weight in weights]
        self.packed: list[Packed] = [
            (data.clone(), offsets.clone(), layout) for _ in range(copies) for data, offsets, layout in packed
        ]
        self.bytes = {
            "compressed": sum(data.nbytes + offsets.nbytes for data, offsets, _ in self.packed),
            "dense": sum(weight.nbytes for weight in self.dense),
        }

    def inputs(self, tokens: int) -> dict[int, Tensor]:
        """Of each width."""
        widths = {weight.shape[1] for weight in self.dense}
        like = self.dense[0]
        return {
            width: torch.randn(tokens, width, dtype=like.dtype, device=like.device)
            for width in sorted(widths)
        }

    def run_dense(self, x: dict[int, Tensor]) -> list[Tensor]:
        return [linear(x[weight.shape[1]], weight) for weight in self.dense]

    def run_compressed(self, x: dict[int, Tensor]) -> list[Tensor]:
        return [
            sparse_linear(x[layout.columns], data, offsets, None, layout)
            for data, offsets, layout in self.packed
        ]

    def error(self, x: dict[int, Tensor]) -> float:
        """Of the compressed product, relative to that in float64, over all layers of a copy.

        Raises:
            ArithmeticError: it is more than rounding to bfloat16 explains.
        """
        lost = energy = 0.0
        for weight, found in zip(self.dense[:7], self.run_compressed(x)[:7], strict=True):
            exact = x[weight.shape[1]].double() @ weight.double().T
            lost += float((found - exact).square().sum())
            energy += float(exact.square().sum())
        error = (lost / energy) ** 0.5
        if not error < 1e-2:
            raise ArithmeticError(f"the compressed product is off by {error:.2g}")
        return error


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The kernels of one call, as a graph's replay; without a GPU the call itself."""
    if device.type != "cuda":
        return run
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measured(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each, in turns."""
    on_gpu = device.type == "cuda"
    clocked = {name: timed(captured(run, device), on_gpu=on_gpu) for name, run in runs.items()}
    return in_turns(clocked, rounds, warm_up=3)


def copies_a_second(device: torch.device, rounds: int) -> float:
    """Bytes that a large copy on the device reads and writes."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measured({"copy": lambda: target.copy_(source)}, rounds, device)
    return 2 * source.nbytes / medians(times)["copy"]


def compare(block: Block, sparsity: float, tokens: int, bandwidth: float, rounds: int) -> Record:
    x = block.inputs(tokens)
    error = block.error(x)
    runs = {"compressed": partial(block.run_compressed, x), "dense": partial(block.run_dense, x)}
    times = measured(runs, rounds, block.dense[0].device)
    seconds = medians(times)
    return {
        "sparsity": sparsity,
        "tokens": tokens,
        "speedup": speedup(times, "compressed", "dense"),
        "bytes": block.bytes,
        "seconds": seconds,
        "share_of_bandwidth": {
            name: block.bytes[name] / seconds[name] / bandwidth for name in ("compressed", "dense")
        },
        "relative_error": error,
    }


def two_of_four(shapes: list[tuple[int, int]], tokens: int, rounds: int, device: torch.device) -> Record:
    """2:4 against dense, one block."""
    block = Block(shapes, 0.0, 1, device)
    x = block.inputs(tokens)
    for weight in block.dense:
        groups = weight.view(len(weight), -1, 4)
        groups.scatter_(2, groups.abs().topk(2, dim=2, largest=False).indices, 0)
    sparse = [torch.sparse.to_sparse_semi_structured(weight) for weight in block.dense]
    runs = {
        "2:4": lambda: [linear(x[weight.shape[1]], weight) for weight in sparse],
        "dense": partial(block.run_dense, x),
    }
    times = measured(runs, rounds, device)
    return against_dense("2:4", tokens, times)


def against_dense(name: str, tokens: int, times: dict[str, list[float]]) -> Record:
    """A row of results."""
    return {
        "pattern": name,
        "tokens": tokens,
        "speedup": speedup(times, name, "dense"),
        "seconds": medians(times),
    }


def four_bits(
    shapes: list[tuple[int, int]], tokens: int, rounds: int, copies: int, device: torch.device
) -> Record:
    """Dense int4 by torchao against dense bfloat16. (It has not been run: torchao was not where other
    figures are from.)"""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    block = Block(shapes, 0.0, copies, device)
    x = block.inputs(tokens)
    layers = torch.nn.ModuleList()
    for weight in block.dense:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        layers.append(layer)
    quantize_(layers, Int4WeightOnlyConfig(group_size=128))
    runs = {
        "int4": lambda: [layer(x[layer.in_features]) for layer in layers],
        "dense": partial(block.run_dense, x),
    }
    times = measured(runs, rounds, device)
    return against_dense("int4", tokens, times)


def compare_tiles(
    block: Block, sparsity: float, name: str, bandwidth: float, rounds: int
) -> Iterator[Record]:
    """`compare` with each tile, first with the one that is used."""
    used = getattr(gpu, name)
    tried = [gpu.Tile(*sizes) for sizes in itertools.product(*TILES[name])]
    fitting = [tile for tile in tried if tile.rows * tile.columns // (32 * tile.warps) in PER_THREAD]
    for tile in dict.fromkeys((used, *fitting)):
        setattr(gpu, name, tile)
        try:
            row = compare(block, sparsity, TOKENS[name], bandwidth, rounds)
        except Exception as error:  # too large for the chip, perhaps: the others are still to be seen
            print(f"{tile}: {error}", flush=True)
            continue
        finally:
            setattr(gpu, name, used)
        yield {"tile": tile._asdict()} | row


def cells(row: Record) -> list[Any]:
    """Of a row, for the table."""
    return [
        row["tokens"],
        row.get("pattern", row.get("sparsity")),
        "x".join(str(size) for size in row.get("tile", {}).values()),
        *(1e3 * seconds for seconds in row["seconds"].values()),
        row["speedup"],
        row.get("share_of_bandwidth", {}).get("compressed", ""),
        row.get("relative_error", ""),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 16, 64, 512, 2048])
    parser.add_argument("--two-of-four", type=int, nargs="*", default=[], help="tokens")
    parser.add_argument("--int4", type=int, nargs="*", default=[], help="tokens")
    parser.add_argument("--tiles", type=float, nargs="*", default=[], help="sparsities")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--copies", type=int, default=4, help="of the block")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_decode.json")
    settings = parser.parse_args()
    device = torch.device(settings.device)
    shapes = block_shapes(settings.width, settings.mlp)
    torch.manual_seed(0)
    bandwidth = copies_a_second(device, settings.rounds)
    about = {**environment(), "bytes_copied_per_second": bandwidth}
    about |= {key: getattr(settings, key) for key in ("width", "mlp", "copies", "rounds")}
    rows: list[Record] = []

    def keep(row: Record) -> None:
        rows.append(row)
        save(settings.results, about, rows)
        print_row(cells(row))

    print(f"a copy reads and writes {bandwidth / 1e12:.2f} TB/s")
    print_table(
        ["tokens", "zeros", "tile", "ms", "dense ms", "speed-up", "of the copy's bandwidth", "error"], []
    )
    for sparsity in settings.sparsities:
        block = Block(shapes, sparsity, settings.copies, device)
        for tokens in settings.tokens:
            keep(compare(block, sparsity, tokens, bandwidth, settings.rounds))
    for tokens in settings.two_of_four:
        keep(two_of_four(shapes, tokens, settings.rounds, device))
    for tokens in settings.int4:
        keep(four_bits(shapes, tokens, settings.rounds, settings.copies, device))
    for sparsity in settings.tiles:
        block = Block(shapes, sparsity, settings.copies, device)
        for name in TILES:
            for row in compare_tiles(block, sparsity, name, bandwidth, settings.rounds):
                keep(row)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
