"""Where expanding a weight and using the ordinary product overtakes the kernel that reads it packed.

One linear layer of Llama's MLP, over the number of tokens, both ways in turn; medians. The smallest number
of tokens at which expansion wins is where `secateurs.runtime.kernels.DIRECT_TOKENS` should lie.

    python benchmarks/prefill_cpu.py
"""

import argparse
import statistics
import time

import torch

from common import RESULTS, environment, save
from secateurs.runtime import kernels
from secateurs.runtime.format import pack, row_offsets
from secateurs.runtime.kernels import sparse_linear


def seconds(direct_tokens: int, x: torch.Tensor, weights: list[tuple]) -> float:
    kernels.DIRECT_TOKENS = direct_tokens
    start = time.perf_counter()
    for data, offsets, layout in weights:
        sparse_linear(x, data, offsets, None, layout)
    return (time.perf_counter() - start) / len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128])
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    rows = []
    for sparsity in settings.sparsities:
        weights = []
        for _ in range(4):
            weight = torch.randn(11008, 4096, dtype=torch.bfloat16)
            weight[torch.rand(weight.shape) < sparsity] = 0
            data, layout = pack(weight)
            weights.append((data, row_offsets("weight", data, layout), layout))
        for tokens in settings.tokens:
            x = torch.randn(tokens, 4096, dtype=torch.bfloat16)
            times = [
                (seconds(tokens, x, weights), seconds(0, x, weights)) for _ in range(settings.rounds + 1)
            ][1:]
            row = {
                "sparsity": sparsity,
                "tokens": tokens,
                "direct": statistics.median(direct for direct, _ in times),
                "expanded": statistics.median(expanded for _, expanded in times),
            }
            rows.append(row)
            print(
                f"{sparsity:.0%}, {tokens} tokens: direct {1e3 * row['direct']:.2f} ms, "
                f"expanded {1e3 * row['expanded']:.2f} ms",
                flush=True,
            )
    save(RESULTS / "prefill_cpu.json", environment() | vars(settings), rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
