"""Two processes of one thread each against one such: seconds of a prune run, in pairs that take turns.

The model is a Llama of random bfloat16 weights: width 1024, MLP 2816, two blocks; 70 %. The two processes are
started by torchrun. The clock covers loading, pruning and writing, not the imports. On a machine where other
processes run as well (the load stands beside each run) seconds say little; the ratio of the one process's
processor seconds to those of the busier of the two says more, but leaves out how long that one waits.

    python benchmarks/prune_ranks.py
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from common import HERE, RESULTS, Record, environment, print_table, save
from random_models import random_llama, random_tokens

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(job: Record, ranks: int) -> Record:
    """One run, and what each of its processes tells."""
    shutil.rmtree(job["output"], ignore_errors=True)
    launcher = [sys.executable] if ranks == 1 else [*TORCHRUN, str(ranks)]
    load = os.getloadavg()[0]
    done = subprocess.run(
        [*launcher, str(HERE / "job.py"), json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(told) != ranks:
        raise RuntimeError(f"{job} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return {
        "ranks": ranks,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "seconds": max(each["seconds"] for each in told),
        "processor_seconds": [each["processor_seconds"] for each in told],
        "phases": told[0]["phases"],
    }


def main(
    methods: tuple[str, ...] = ("sparsegpt", "sparsellm"),
    samples: int = 128,
    length: int = 512,
    pairs: int = 3,
    results: Path = RESULTS / "prune_ranks.json",
) -> None:
    about = {**environment(), "samples": samples, "length": length, "pattern": "70%"}
    rows: list[Record] = []
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        model = random_llama(here / "model", 2, "bfloat16", width=1024, channels=2816)
        tokens = random_tokens(here / "ids.safetensors", samples, length)
        shared = {
            "tool": "secateurs",
            "model": str(model),
            "tokens": str(tokens),
            "output": str(here / "out"),
        }
        for method in methods:
            job = {**shared, "pattern": "70%", "method": method}
            of_method: list[tuple[Record, Record]] = []
            for _ in range(pairs):
                of_method.append((run(job, 1), run(job, 2)))
                rows += [{"method": method, **one} for one in of_method[-1]]
                save(results, about, rows)
            faster = [one["seconds"] / two["seconds"] for one, two in of_method]
            less = [one["processor_seconds"][0] / max(two["processor_seconds"]) for one, two in of_method]
            seconds = [
                statistics.median(each["seconds"] for each in runs) for runs in zip(*of_method, strict=True)
            ]
            loads = max(each["load_after"] for pair in of_method for each in pair)
            table.append([method, *seconds, *(statistics.median(each) for each in (faster, less)), loads])
    print_table(
        ["method", "one: seconds", "two: seconds", "times as fast", "processor seconds", "highest load"],
        table,
    )


if __name__ == "__main__":
    tyro.cli(main)
