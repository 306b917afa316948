"""SparseGPT, ADMM and SparseLLM on a GPU: blocks of Llama-2-7B's geometry, by phase, against the floor.

Random weights and tokens, bfloat16, 128 x 2048 calibration tokens, 70 %. Two blocks are pruned. All have the
same work, so a whole model takes what the first did, for each other block what the second did, and the rest.
"sparsellm, sparsegpt" has SparseGPT inside and each MLP's own output as the target, as published; "sparsellm"
is what `secateurs prune` does, refinement included.

The floor of a phase is its arithmetic: what is multiplied in each precision, counted as it happens in a run
of its own, over the rate that a product of 8192 x 8192 matrices reaches here in that precision;
factorisations and triangular solves at that of float32. Peak memory is what torch has allocated.

    python benchmarks/prune_gpu.py
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import secateurs
from common import RESULTS, Record, arguments, environment, print_table, save
from random_models import large_llama, random_ids
from secateurs.pruning.folder import WorkFolder
from timing import in_turns, medians, timed

METHODS: dict[str, Record] = {
    "sparsegpt": {"method": "sparsegpt"},
    "admm": {"method": "admm"},
    "sparsellm, sparsegpt": {"method": "sparsellm:solver=sparsegpt", "target": "layer"},
    "sparsellm": {"method": "sparsellm"},
}
BLOCKS = 2  # that are pruned
PRECISIONS = ("bfloat16", "float32")

Amounts = Mapping[Any, float]


def rates(device: torch.device, size: int) -> dict[str, float]:
    """Operations a second of products of large random matrices, by precision."""
    runs = {}
    for name in PRECISIONS:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        runs[name] = timed(partial(torch.matmul, a, b), on_gpu=device.type == "cuda")
    return {name: 2 * size**3 / spent for name, spent in medians(in_turns(runs, 10, warm_up=3)).items()}


class Count(TorchDispatchMode):
    """Operations by phase and precision."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.phase = device, "outside"
        self.operations: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        amount = 0.0
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm"):
            factors = args[1:3] if name.startswith(("add", "badd")) else args[:2]
            amount, kind = 2.0 * result.numel() * factors[0].shape[-1], factors[0]
        elif name.startswith("_scaled_dot_product"):
            backward = 2.5 if "backward" in name else 1.0
            query, key = args[1:3] if "backward" in name else args[:2]
            amount = backward * 2.0 * query.numel() * key.shape[-2]  # two products, half of each masked
            kind = query
        elif name == "linalg_cholesky_ex":
            amount, kind = len(args[0]) ** 3 / 3, args[0]
        elif name == "cholesky_inverse":
            amount, kind = len(args[0]) ** 3 * 2 / 3, args[0]
        elif name == "linalg_solve_triangular":
            amount, kind = 1.0 * args[1].numel() * len(args[0]), args[0]
        if amount and kind.device.type == self.device.type:
            self.operations[self.phase, str(kind.dtype).removeprefix("torch.")] += amount
        return result


def prune(
    model: Path, ids: torch.Tensor, device: torch.device, settings: Record
) -> tuple[secateurs.Report, list[Amounts]]:
    """The run's record, and the seconds of its phases in each block and after the last.

    A block's writing, and pushing tokens through it, count as the next one's.
    """
    parts: list[Counter[str]] = []
    write_block = WorkFolder.write_block

    def noting(work: WorkFolder, *rest: Any) -> None:
        parts.append(Counter(work.phases))
        write_block(work, *rest)

    with (
        tempfile.TemporaryDirectory(dir=model.parent) as temporary,
        patch.object(WorkFolder, "write_block", noting),
    ):
        report = secateurs.prune(
            model,
            output=Path(temporary) / "out",
            calibration=ids,
            pattern="70%",
            device=device.type,
            **settings,
        )
    done = Counter(report.phases)
    for part in parts:
        done.subtract(part)
    return report, [*parts, done]


def count(model: Path, ids: torch.Tensor, device: torch.device, settings: Record) -> list[Amounts]:
    """Operations of the same parts, by phase and precision."""
    parts: list[Counter[tuple[str, str]]] = []
    clock, write_block = WorkFolder.clock, WorkFolder.write_block
    counted = Count(device)

    @contextmanager
    def watched(work: WorkFolder, phase: str) -> Iterator[None]:
        counted.phase = phase
        with clock(work, phase):
            yield
        counted.phase = "outside"

    def noting(work: WorkFolder, *rest: Any) -> None:
        parts.append(counted.operations)
        counted.operations = Counter()
        write_block(work, *rest)

    with patch.object(WorkFolder, "clock", watched), patch.object(WorkFolder, "write_block", noting), counted:
        prune(model, ids, device, settings)
    return [*parts, counted.operations]


def of_a_model(parts: list[Amounts], blocks: int) -> dict[Any, float]:
    """What a model of so many blocks takes."""
    first, second, rest = (Counter(part) for part in parts)
    kinds = dict.fromkeys((*first, *second, *rest))
    return {kind: first[kind] + (blocks - 1) * second[kind] + rest[kind] for kind in kinds}


def floor_of(operations: Amounts, rates: dict[str, float]) -> dict[str, float]:
    """Seconds by phase."""
    floor: Counter[str] = Counter()
    for (phase, precision), amount in operations.items():
        floor[phase] += amount / rates[precision]
    return floor


def print_phases(row: Record, blocks: int) -> None:
    seconds, floor = row["phases"], row.get("floor", {})
    total = sum(seconds.values())
    peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB at the most"
    print(f"\n{row['method']}: {total:.0f} s for {blocks} blocks{peak}\n")
    print_table(
        ["phase", "seconds", "of the second block", "floor", "x"],
        [
            [phase, spent, row["parts"][1].get(phase, 0.0), least or "", spent / least if least else ""]
            for phase, spent in seconds.items()
            for least in [floor.get(phase, 0.0)]
        ],
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--blocks", type=int, default=32, help="of the model whose seconds are told")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--product", type=int, default=8192, help="size of the matrices that set the rates")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="for models of two blocks, the pruned and the dense")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_prune.json")
    settings = parser.parse_args()
    device = torch.device(settings.device)
    about = environment() | {"pattern": "70%", "operations_per_second": rates(device, settings.product)}
    about |= {key: getattr(settings, key) for key in ("blocks", "width", "mlp", "heads", "samples", "length")}
    ids = random_ids(settings.samples, settings.length)
    rows: dict[str, Record] = {}
    with tempfile.TemporaryDirectory(dir=settings.folder) as temporary:
        folder = Path(temporary) / "model"
        model = large_llama(folder, BLOCKS, settings.width, settings.mlp, settings.heads, device)
        for name in settings.methods:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            report, parts = prune(model, ids, device, METHODS[name])
            rows[name] = {
                "method": name,
                "phases": of_a_model(parts, settings.blocks),
                "parts": parts,
                "seconds_of_two_blocks": report.seconds,
                "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
                "sparsity": report.sparsity,
            }
            save(settings.results, about, list(rows.values()))
            print_phases(rows[name], settings.blocks)
        for name in settings.methods:
            operations = of_a_model(count(model, ids, device, METHODS[name]), settings.blocks)
            rows[name]["operations"] = {"/".join(kind): amount for kind, amount in operations.items()}
            rows[name]["floor"] = floor_of(operations, about["operations_per_second"])
            save(settings.results, about, list(rows.values()))
            print_phases(rows[name], settings.blocks)


if __name__ == "__main__":
    main()
