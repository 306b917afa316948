"""Where expanding a weight and using the ordinary product overtakes the kernel that reads it packed.

Linear layers of Llama's MLP over the number of tokens: straight from the packed weight, expanded in panels
of several sizes, and dense, in turns; medians. The fewest tokens at which expansion wins are where
`secateurs.runtime.kernels.DIRECT_TOKENS` should lie, and the panel that wins is `PANEL_BYTES`.

    python benchmarks/prefill_cpu.py
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from common import RESULTS, Record, arguments, environment, save
from random_models import packed_weight, sparse_weight
from secateurs.runtime import kernels
from secateurs.runtime.kernels import sparse_linear
from secateurs.runtime.layout import Layout
from timing import in_turns, medians, timed

ROWS, COLUMNS, LAYERS = 11008, 4096, 4
MEGABYTE = 1 << 20


def packed(
    x: Tensor, weights: list[tuple[Tensor, Tensor, Layout]], direct_tokens: int, panel_bytes: int
) -> None:
    kernels.DIRECT_TOKENS, kernels.PANEL_BYTES = {x.dtype: direct_tokens}, panel_bytes
    for data, offsets, layout in weights:
        sparse_linear(x, data, offsets, None, layout)


def dense(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        torch.nn.functional.linear(x, weight)


def main() -> None:
    parser = arguments(__doc__)
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
            weights = [sparse_weight((ROWS, COLUMNS), sparsity, getattr(torch, dtype)) for _ in range(LAYERS)]
            layers = [packed_weight(weight) for weight in weights]
            for tokens in settings.tokens:
                x = torch.randn(tokens, COLUMNS, dtype=getattr(torch, dtype))
                runs: dict[str, Callable[[], object]] = {"dense": partial(dense, x, weights)}
                if tokens <= 64:
                    runs["direct"] = partial(packed, x, layers, tokens, MEGABYTE)
                for panel in settings.panels:
                    runs[f"panels of {panel} MB"] = partial(packed, x, layers, 0, panel * MEGABYTE)
                times = in_turns({name: timed(run) for name, run in runs.items()}, settings.rounds)
                a_layer = {name: seconds / LAYERS for name, seconds in medians(times).items()}
                rows.append({"dtype": dtype, "sparsity": sparsity, "tokens": tokens, "seconds": a_layer})
                print(
                    f"{dtype}, {sparsity:.0%}, {tokens} tokens:",
                    ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in a_layer.items()),
                    flush=True,
                )
                save(RESULTS / "prefill_cpu.json", about, rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
