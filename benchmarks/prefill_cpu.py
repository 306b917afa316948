"""Where expanding a weight and using the ordinary product overtakes the kernel that reads it packed.

Linear layers of Llama's MLP over the number of tokens: straight from the packed weight, expanded in panels
of several sizes, and dense, in turns; medians. The fewest tokens at which expansion wins are where
`secateurs.runtime.kernels.DIRECT_TOKENS` should lie, or `DIRECT_TOKENS_OF_CODES`, if there are
any on a machine; and the panel that wins is `PANEL_BYTES`.

    python benchmarks/prefill_cpu.py
    python benchmarks/prefill_cpu.py --values int8 int4 int3 --sparsities 0 0.5 --panels 4 \
        --results benchmarks/results/prefill_codes_cpu.json
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from common import RESULTS, Record, arguments, environment, save
from random_models import packed_weight, sparse_weight
from secateurs.runtime import kernels
from secateurs.runtime.format import pack, row_offsets
from secateurs.runtime.kernels import sparse_linear
from secateurs.runtime.layout import Layout
from secateurs.values import Values, parse_values
from timing import in_turns, medians, timed

ROWS, COLUMNS, LAYERS = 11008, 4096, 4
MEGABYTE = 1 << 20
AS_STORED = "as stored"


def packed(
    x: Tensor, weights: list[tuple[Tensor, Tensor, Layout]], direct_tokens: int, panel_bytes: int
) -> None:
    with (
        patch.object(kernels, "direct_tokens", lambda *_: direct_tokens),
        patch.object(kernels, "PANEL_BYTES", panel_bytes),
    ):
        for data, offsets, layout in weights:
            sparse_linear(x, data, offsets, None, layout)


def dense(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        torch.nn.functional.linear(x, weight)


def rounded_weight(weight: Tensor, values: Values) -> tuple[Tensor, Tensor, Layout]:
    """A weight with random levels where it is not zero, packed; without a mask if hardly any is."""
    scales = torch.rand(len(weight), values.groups(weight.shape[1])).bfloat16()
    codes = torch.randint(2**values.bits, weight.shape, dtype=torch.uint8)
    masked = float((weight == 0).float().mean()) > 0.1
    kept = weight != 0 if masked else torch.ones_like(weight, dtype=torch.bool)
    weight = (values.decode(codes, scales) * kept).to(weight.dtype)
    data, layout = pack(weight, (values, scales), masked=masked)
    return data, row_offsets("layer", data, layout), layout


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128])
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.7])
    parser.add_argument("--panels", type=int, nargs="*", default=[2, 4, 8, 16], help="MB of dense weight")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--values", nargs="*", default=[AS_STORED], help="int4, say")
    parser.add_argument("--most", type=int, default=64, help="tokens straight from the packed weight")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS / "prefill_cpu.json")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    about = environment() | {**vars(settings), "results": settings.results.name}
    rows: list[Record] = []
    for dtype, values, sparsity in product(settings.dtypes, settings.values, settings.sparsities):
        weights = [sparse_weight((ROWS, COLUMNS), sparsity, getattr(torch, dtype)) for _ in range(LAYERS)]
        if values == AS_STORED:
            layers = [packed_weight(weight) for weight in weights]
        else:
            layers = [rounded_weight(weight, parse_values(values)) for weight in weights]
        for tokens in settings.tokens:
            x = torch.randn(tokens, COLUMNS, dtype=getattr(torch, dtype))
            runs: dict[str, Callable[[], object]] = {"dense": partial(dense, x, weights)}
            if tokens <= settings.most:
                runs["direct"] = partial(packed, x, layers, tokens, MEGABYTE)
            for panel in settings.panels:
                runs[f"panels of {panel} MB"] = partial(packed, x, layers, 0, panel * MEGABYTE)
            times = in_turns({name: timed(run) for name, run in runs.items()}, settings.rounds)
            a_layer = {name: seconds / LAYERS for name, seconds in medians(times).items()}
            row = {"dtype": dtype, "values": values, "sparsity": sparsity, "tokens": tokens}
            rows.append({**row, "seconds": a_layer})
            print(
                f"{dtype}, {values}, {sparsity:.0%}, {tokens} tokens:",
                ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in a_layer.items()),
                flush=True,
            )
            save(settings.results, about, rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
