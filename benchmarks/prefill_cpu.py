"""Where expanding a weight and using the ordinary product overtakes the kernel that reads it packed.

Linear layers of Llama's MLP over the number of tokens: straight from the packed weight, expanded in panels
of several sizes, and dense, in turns; medians. The fewest tokens at which expansion wins are where
`secateurs.runtime.kernels.DIRECT_TOKENS` should lie, and the panel that wins is `PANEL_BYTES`.

    python benchmarks/prefill_cpu.py
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from common import RESULTS, Record, environment, save
from secateurs.runtime import kernels
from secateurs.runtime.format import Layout, pack, row_offsets
from secateurs.runtime.kernels import sparse_linear

ROWS, COLUMNS, LAYERS = 11008, 4096, 4
MEGABYTE = 1 << 20


def packed_seconds(
    x: Tensor, weights: list[tuple[Tensor, Tensor, Layout]], direct_tokens: int, panel_bytes: int
) -> float:
    kernels.DIRECT_TOKENS, kernels.PANEL_BYTES = {x.dtype: direct_tokens}, panel_bytes
    start = time.perf_counter()
    for data, offsets, layout in weights:
        sparse_linear(x, data, offsets, None, layout)
    return (time.perf_counter() - start) / len(weights)


def dense_seconds(x: Tensor, weights: list[Tensor]) -> float:
    start = time.perf_counter()
    for weight in weights:
        torch.nn.functional.linear(x, weight)
    return (time.perf_counter() - start) / len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128])
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.7])
    parser.add_argument("--panels", type=int, nargs="*", default=[2, 4, 8, 16], help="MB of dense weight")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    about = environment() | vars(settings)
    rows: list[Record] = []
    for dtype in settings.dtypes:
        for sparsity in settings.sparsities:
            dense, packed = [], []
            for _ in range(LAYERS):
                weight = torch.randn(ROWS, COLUMNS, dtype=getattr(torch, dtype))
                weight[torch.rand(ROWS, COLUMNS) < sparsity] = 0
                data, layout = pack(weight)
                dense.append(weight)
                packed.append((data, row_offsets("weight", data, layout), layout))
            for tokens in settings.tokens:
                x = torch.randn(tokens, COLUMNS, dtype=getattr(torch, dtype))
                seconds: dict[str, list[float]] = {}
                for _ in range(settings.rounds + 1):
                    taken = {"dense": dense_seconds(x, dense)}
                    if tokens <= 64:
                        taken["direct"] = packed_seconds(x, packed, tokens, MEGABYTE)
                    for panel in settings.panels:
                        taken[f"panels of {panel} MB"] = packed_seconds(x, packed, 0, panel * MEGABYTE)
                    for name, value in taken.items():
                        seconds.setdefault(name, []).append(value)
                medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
                rows.append({"dtype": dtype, "sparsity": sparsity, "tokens": tokens, "seconds": medians})
                print(
                    f"{dtype}, {sparsity:.0%}, {tokens} tokens:",
                    ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in medians.items()),
                    flush=True,
                )
                save(RESULTS / "prefill_cpu.json", about, rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
