"""SparseLLM on a GPU: blocks of Llama-2-7B's geometry, by phase, against the floor.

Random weights and tokens, bfloat16, 128 x 2048 calibration tokens, 70 %, four iterations. "sparsegpt" and
"admm" name the solver inside; each MLP's own output is the target, as published, or the dense model
("default" is what `secateurs prune` does, refinement included).

The floor of a phase is its arithmetic: what is multiplied in each precision, counted as it happens in runs
over one block and over two, over the rate that a product of 8192 x 8192 matrices reaches here in that
precision; factorisations and triangular solves at that of float32. Peak memory is what torch has allocated.

    python benchmarks/sparsellm_gpu.py
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

import secateurs
from common import RESULTS, Record, environment, print_table, save
from secateurs.pruning.folder import WorkFolder

METHODS: dict[str, Record] = {
    "sparsegpt": {"method": "sparsellm:solver=sparsegpt", "target": "layer"},
    "admm": {"method": "sparsellm", "target": "layer"},
    "sparsegpt dense": {"method": "sparsellm:solver=sparsegpt", "target": "dense", "refine": 0},
    "admm dense": {"method": "sparsellm", "target": "dense", "refine": 0},
    "default": {"method": "sparsellm"},
}
SIZE = 8192
PRECISIONS = ("bfloat16", "float32")


def llama_blocks(folder: Path, blocks: int) -> Path:
    """A model folder of Llama-2-7B's geometry with random weights, a file for each block."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    hidden, channels = config.hidden_size, config.intermediate_size
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (channels, hidden),
        "mlp.up_proj": (channels, hidden),
        "mlp.down_proj": (hidden, channels),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    files = [
        {f"model.layers.{index}.{name}.weight": shape for name, shape in shapes.items()}
        for index in range(blocks)
    ]
    files.append(
        {
            "model.embed_tokens.weight": (32000, hidden),
            "lm_head.weight": (32000, hidden),
            "model.norm.weight": (hidden,),
        }
    )
    torch.manual_seed(0)
    weight_map = {}
    for number, tensors in enumerate(files):
        file = f"model-{number:05}.safetensors"
        made = {name: random_weight(shape) for name, shape in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def random_weight(shape: tuple[int, ...]) -> torch.Tensor:
    """Of a matrix; the scale of a norm is 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(0.02).cpu()


def rates() -> dict[str, float]:
    """Operations a second of products of large random matrices, by precision; medians."""
    found = {}
    for name in PRECISIONS:
        a, b = (torch.randn(SIZE, SIZE, device="cuda").to(getattr(torch, name)) for _ in range(2))
        seconds = []
        for _ in range(13):
            torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        found[name] = 2 * SIZE**3 / statistics.median(seconds[3:])
    return found


class Count(TorchDispatchMode):
    """Operations by phase and precision."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "outside"
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
        if amount and kind.is_cuda:
            self.operations[self.phase, str(kind.dtype).removeprefix("torch.")] += amount
        return result


def count(model: Path, ids: torch.Tensor, output: Path, settings: Record) -> Counter[tuple[str, str]]:
    """Operations of a run, by phase and precision."""
    clock = WorkFolder.clock

    @contextmanager
    def watched(work: WorkFolder, phase: str) -> Iterator[None]:
        counted.phase = phase
        with clock(work, phase):
            yield
        counted.phase = "outside"

    counted = Count()
    with patch.object(WorkFolder, "clock", watched), counted:
        secateurs.prune(model, output=output, calibration=ids, pattern="70%", **settings)
    return counted.operations


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["sparsegpt", "admm"])
    parser.add_argument("--folder", type=Path, help="for models of 13 GB each, the pruned and the dense")
    parser.add_argument("--results", type=Path, default=RESULTS / "sparsellm_gpu.json")
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    about = {**environment(), "samples": settings.samples, "length": settings.length, "pattern": "70%"}
    about["operations_per_second"] = rates()
    ids = torch.randint(
        32000, (settings.samples, settings.length), generator=torch.Generator().manual_seed(0)
    )
    rows: list[Record] = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as temporary:
        here = Path(temporary)
        models = {blocks: llama_blocks(here / f"{blocks}", blocks) for blocks in {1, 2, settings.blocks}}
        for name in settings.methods:
            counts = []
            for blocks in (1, 2):
                counts.append(count(models[blocks], ids, here / "counted", METHODS[name]))
                shutil.rmtree(here / "counted")
            one, two = counts
            # The last block's result is not needed.
            operations = {
                kind: one[kind] + (settings.blocks - 1) * (amount - one[kind]) for kind, amount in two.items()
            }
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            report = secateurs.prune(
                models[settings.blocks], output=here / "out", calibration=ids, pattern="70%", **METHODS[name]
            )
            shutil.rmtree(here / "out")
            row = {
                "method": name,
                "blocks": settings.blocks,
                "seconds": report.seconds,
                "phases": report.phases,
                "operations": {"/".join(kind): amount for kind, amount in operations.items()},
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "sparsity": report.sparsity,
            }
            rows.append(row)
            save(settings.results, about, rows)
            floor = {
                phase: sum(
                    amount / about["operations_per_second"][precision]
                    for (where, precision), amount in operations.items()
                    if where == phase
                )
                for phase in report.phases
            }
            print(f"\n{name}: {report.seconds:.1f} s, {row['peak_bytes'] / 1e9:.1f} GB\n")
            print_table(
                ["phase", "seconds", "floor", "x"],
                [
                    [phase, spent, floor[phase], spent / floor[phase] if floor[phase] else ""]
                    for phase, spent in report.phases.items()
                ],
            )


if __name__ == "__main__":
    main()
