"""Time and peak memory of pruning against the model's depth and the number of calibration samples.

Llamas of width 512, MLP 1376 and 2 to 16 blocks with random weights, 256 tokens a sample, SparseGPT at 70
%, on a processor, a fresh process for each run. One block at a time is in memory, so the peak should not
grow with depth, only with the tokens; the seconds should grow in proportion to both. The last columns
compare with the shallowest model at the same number of samples.

    python benchmarks/depth_memory.py
"""

import tempfile
from pathlib import Path

import tyro

from common import RESULTS, Record, environment, middle, print_table, save
from job import in_processes
from random_models import random_llama, random_tokens


def main(
    depths: tuple[int, ...] = (2, 4, 8, 16),
    samples: tuple[int, ...] = (16, 32, 64),
    length: int = 256,
    method: str = "sparsegpt",
    pattern: str = "70%",
    dtype: str = "bfloat16",
    repetitions: int = 3,
    results: Path = RESULTS / "depth_memory.json",
) -> None:
    about = {**environment(), "length": length, "method": method, "pattern": pattern, "dtype": dtype}
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        jobs: dict[tuple[int, int], Record] = {}
        for depth in depths:
            model = random_llama(here / f"{depth}", depth, dtype)
            for count in samples:
                jobs[depth, count] = {
                    "tool": "secateurs",
                    "model": str(model),
                    "tokens": str(random_tokens(here / f"{count}.safetensors", count, length)),
                    "output": str(here / "pruned"),
                    "method": method,
                    "pattern": pattern,
                }
        for (depth, count), runs in in_processes(jobs, repetitions).items():
            rows.append({"samples": count, "depth": depth, "runs": runs})
    rows.sort(key=lambda row: (row["samples"], row["depth"]))
    save(results, about, rows)

    table = []
    for row in rows:
        first = next(other["runs"] for other in rows if other["samples"] == row["samples"])
        seconds, peak = middle(row["runs"], "seconds"), middle(row["runs"], "peak_bytes")
        table.append(
            [
                row["samples"],
                row["depth"],
                seconds,
                seconds / row["depth"],
                peak / 1e6,
                seconds / middle(first, "seconds"),
                peak / middle(first, "peak_bytes"),
            ]
        )
    print_table(["samples", "blocks", "seconds", "seconds/block", "peak MB", "x seconds", "x peak"], table)


if __name__ == "__main__":
    tyro.cli(main)
