"""One token through a block's linear layers on the CPU: compressed against dense and CSR, paired in one run.

The block is Llama's at width 4096 with an MLP of 11008. Every contender has its own copy of all seven
weights, several times the last-level cache, so weights come from memory as they do when a whole model
decodes. Contenders take turns within each round; figures are medians over rounds. The bound is a plain read
of the same bytes by the same threads.

    python benchmarks/decode_cpu.py
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common import RESULTS, arguments, environment, save
from random_models import block_shapes, packed_weight, sparse_weight
from secateurs.runtime.kernels import sparse_linear
from timing import in_turns, medians, speedup, timed

SPARSITIES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]


def contenders(
    sizes: list[tuple[int, int]], sparsity: float, dtype: torch.dtype, tokens: int
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Name -> one pass over the block, and name -> bytes of weights that it reads."""
    x = {columns: torch.randn(tokens, columns) for _, columns in sizes}
    narrow = {columns: value.to(dtype) for columns, value in x.items()}
    packed, dense, wide, csr = [], [], [], []
    for rows, columns in sizes:
        weight = sparse_weight((rows, columns), sparsity, dtype)
        packed.append(packed_weight(weight))
        dense.append(weight)
        wide.append(weight.float())
        csr.append(weight.float().to_sparse_csr() if sparsity >= 0.5 else None)
    everything = torch.cat([data for data, _, _ in packed])
    everything = everything[: len(everything) // 8 * 8].view(torch.int64)

    def compressed() -> None:
        for data, offsets, layout in packed:
            sparse_linear(narrow[layout.columns], data, offsets, None, layout)

    def product(weights: list[Tensor], inputs: dict[int, Tensor]) -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    def rows() -> None:
        for weight in csr:
            weight @ x[weight.shape[1]].T

    runs: dict[str, Callable[[], object]] = {
        "compressed": compressed,
        f"dense {dtype}".replace("torch.", ""): lambda: product(dense, narrow),
        "dense float32": lambda: product(wide, x),
        "plain read": lambda: everything.sum(),
    }
    read = sum(data.nbytes + offsets.nbytes for data, offsets, _ in packed)
    weights = sum(weight.numel() for weight in dense)
    sizes_read = dict(
        zip(runs, [read, weights * dtype.itemsize, weights * 4, everything.nbytes], strict=True)
    )
    if sparsity >= 0.5:
        runs["torch CSR float32"] = rows
        # Values of 4 bytes, column indices of 8.
        sizes_read["torch CSR float32"] = sum(12 * weight._nnz() for weight in csr)
    return runs, sizes_read


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sparsities", type=float, nargs="*", default=SPARSITIES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--name", default="decode_cpu", help="of the raw result")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    rows = []
    shapes = block_shapes(settings.width, settings.mlp)
    for sparsity in settings.sparsities:
        runs, read = contenders(shapes, sparsity, getattr(torch, settings.dtype), settings.tokens)
        times = in_turns({name: timed(run) for name, run in runs.items()}, settings.rounds)
        dense = [name for name in runs if name.startswith("dense")]
        row = {
            "sparsity": sparsity,
            "speedup": speedup(times, "compressed", *dense),
            "seconds": medians(times),
            "bytes": read,
        }
        rows.append(row)
        bandwidth = {name: read[name] / row["seconds"][name] for name in ("compressed", "plain read")}
        print(
            f"{sparsity:.2f}: {row['speedup']:.2f}x the faster dense,",
            f"{bandwidth['compressed'] / bandwidth['plain read']:.0%} of a plain read's bandwidth;",
            ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in row["seconds"].items()),
            flush=True,
        )
    save(RESULTS / f"{settings.name}.json", environment() | vars(settings), rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
