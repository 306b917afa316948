"""Time and memory of pruning and compressing one block of Qwen3-30B-A3B's geometry, on a processor.

The block has 32 query and 4 key-value heads of 128, width 2048, and 128 experts of 768 channels of which 8
see a token: 623 million weights at random, in bfloat16, with a vocabulary of 4096 around them. 16 x 512
calibration tokens; 50 %. Each run has a process of its own; the clock covers loading, pruning and writing,
not the imports; memory is the whole process's. At last what SparseGPT leaves is compressed.

SparseLLM's default is not run on all 128 experts, which would take hours here: attention and the first few
experts are pruned by it, each as it would be among the others, without the descent (which would hold about
six times the block's weights in float32, 15 GB).

    python benchmarks/expert_block.py

Processor seconds, the imports' among them, are what a run takes where nothing else runs; on a busy machine
the clock shows more. Where the table says "x 48", that is 48 times a block's, for the model's depth, and not
measured.
"""

import tempfile
from pathlib import Path

import tyro

from common import RESULTS, Record, environment, load, print_table, save
from job import in_processes
from random_models import block_of_experts, random_tokens

DEPTH, VOCABULARY = 48, 4096
PATTERN = "50%"
COMPRESSED = "sparsegpt"


def tools(experts: int) -> dict[str, Record]:
    """By their names in the results; SparseLLM gets so many experts, at most ten."""
    few = {"*.self_attn.*": PATTERN, f"*.experts.[0-{experts - 1}].*": PATTERN}
    return {
        "wanda": {"method": "wanda"},
        COMPRESSED: {"method": COMPRESSED},
        f"sparsellm, {experts} experts": {"method": "sparsellm", "refine": 0, "allocation": few},
    }


def print_results(rows: list[Record]) -> None:
    table = []
    for row in rows:
        run = row["run"]
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run.get("phases", {}).items())
        seconds = [f"{run[name]:.1f}" for name in ("processor_seconds", "seconds")]
        memory = [f"{run[name] / 1e6:.0f}" for name in ("peak_bytes", "import_bytes")]
        hours = f"{DEPTH * run['processor_seconds'] / 3600:.2f}" if row["whole"] else ""
        table.append([row["name"], run.get("matrices", ""), *seconds, phases, *memory, hours])
    header = ["", "matrices", "processor s", "wall s", "phases, wall s", "peak MB", "imports alone MB"]
    print_table([*header, f"x {DEPTH}, hours"], table)
    for row in rows:
        if "bytes_after" in row["run"]:
            before, after = row["run"]["bytes_before"], row["run"]["bytes_after"]
            print(
                f"\n{row['name']}: {before / 1e6:.0f} MB became {after / 1e6:.0f} MB ({after / before:.1%})"
            )


def main(
    samples: int = 16,
    length: int = 512,
    experts: int = 2,
    table: bool = False,
    results: Path = RESULTS / "expert_block.json",
) -> None:
    """See above.

    Args:
        experts: that SparseLLM is given, at most ten.
        table: print what is in the results.
    """
    settings = {"samples": samples, "length": length, "pattern": PATTERN}
    rows = load(results, {} if table else settings)
    if table:
        print_results(rows)
        return
    about = {**environment(), **settings}
    done = {row["name"] for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        model = block_of_experts(here / "model", VOCABULARY)
        tokens = random_tokens(here / "ids.safetensors", samples, length, VOCABULARY)
        shared = {"tool": "secateurs", "model": str(model), "tokens": str(tokens), "pattern": PATTERN}
        jobs = {
            name: {**shared, "output": str(here / "out"), **tool} for name, tool in tools(experts).items()
        }
        for name, job in jobs.items():
            if name in done:
                continue
            [run] = in_processes({name: job}, 1)[name]
            rows.append({"name": name, "whole": "allocation" not in job, "run": run})
            if name == COMPRESSED:
                packing = {"tool": "compress", "model": job["output"], "output": str(here / "packed")}
                [run] = in_processes({name: packing}, 1)[name]
                rows.append({"name": f"compress what {name} left", "whole": True, "run": run})
            save(results, about, rows)
    print_results(rows)


if __name__ == "__main__":
    tyro.cli(main)
