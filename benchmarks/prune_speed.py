"""SparseGPT's seconds and memory: Secateurs against the published code, on a processor.

The model is a Llama of width 512, MLP 1376 and two blocks with random weights; 32 x 256 calibration tokens;
70 %. The published side is the class of a checkout of github.com/IST-DASLab/sparsegpt inside the loop of
its llama.py (see `published` in job.py). Each run has a process of its own; the clock covers loading,
pruning and writing, not the imports; memory is the whole process's. Ours runs in two orders: "block", its
default, is the published one, and there the two should agree on which weights to keep; the other,
"sublayer", measures the MLP's inputs after attention was pruned.

    python benchmarks/prune_speed.py --sparsegpt-repository ../sparsegpt
"""

import tempfile
from pathlib import Path

import torch
import tyro

from common import RESULTS, Record, environment, middle, print_table, save
from job import in_processes
from random_models import random_llama, random_tokens
from scores import saved_tensors


def agreement(one: Path, other: Path) -> float:
    """Share of the linears' weights that both folders keep or both drop."""
    a, b = saved_tensors(one), saved_tensors(other)
    same = [((a[name] == 0) == (b[name] == 0)).flatten() for name in a if "_proj" in name]
    return torch.cat(same).double().mean().item()


def main(
    sparsegpt_repository: Path,
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    samples: int = 32,
    length: int = 256,
    pattern: str = "70%",
    repetitions: int = 5,
    results: Path = RESULTS / "prune_speed.json",
) -> None:
    about = {**environment(), "samples": samples, "length": length, "pattern": pattern}
    tools: dict[str, Record] = {
        "published": {"tool": "published", "repository": str(sparsegpt_repository)},
        "secateurs, block": {"tool": "secateurs", "method": "sparsegpt", "sequential": "block"},
        "secateurs": {"tool": "secateurs", "method": "sparsegpt", "sequential": "sublayer"},
    }
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        tokens = random_tokens(here / "ids.safetensors", samples, length)
        for dtype in dtypes:
            model = random_llama(here / dtype, layers=2, dtype=dtype)
            shared = {"model": str(model), "tokens": str(tokens), "pattern": pattern}
            jobs = {name: {**shared, **tool, "output": str(here / name)} for name, tool in tools.items()}
            for name, runs in in_processes(jobs, repetitions).items():
                same = agreement(here / "published", here / name)
                rows.append({"dtype": dtype, "tool": name, "mask_agreement": same, "runs": runs})
            save(results, about, rows)

    table = []
    for row in rows:
        runs, seconds = row["runs"], middle(row["runs"], "seconds")
        base = next(r["runs"] for r in rows if r["tool"] == "published" and r["dtype"] == row["dtype"])
        table.append(
            [
                row["dtype"],
                row["tool"],
                seconds,
                middle(base, "seconds") / seconds,
                ", ".join(f"{phase} {middle(runs, 'phases', phase):.2f}" for phase in runs[0]["phases"]),
                middle(runs, "peak_bytes") / 1e6,
                middle(runs, "import_bytes") / 1e6,
                row["mask_agreement"],
            ]
        )
    header = ["dtype", "tool", "seconds", "speed-up", "phases", "peak MB", "imports alone MB", "same mask"]
    print_table(header, table)


if __name__ == "__main__":
    tyro.cli(main)
