"""What `secateurs plan` says of a run beside what the run takes: processor seconds and peak memory.

Small models with random weights, and the bundled one, on 32 x 256 tokens at 50 %, each run in a process of
its own with one thread (OMP_NUM_THREADS=1). Seconds are the processor's, from reading to the pruned folder;
memory is the peak above what the imports hold. Then the same of options that add to a run, with the bytes of
what `compress` makes of its result. Then the same of SparseGPT on narrow Llamas by depth, width and samples,
one at a time: seconds should grow in proportion to depth and samples, memory not with depth. With --only
large, nothing is run: what is said of large models, whose configurations are here; with --only recorded
neither: what is said of the runs on an H200 that gpu_prune.json has.

    OMP_NUM_THREADS=1 python benchmarks/plan.py
"""

import argparse
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, Qwen3MoeConfig

import secateurs
from common import RESULTS, Record, arguments, environment, load, print_row, print_table, save
from job import in_processes
from random_models import random_experts, random_llama, random_tokens
from secateurs import demo
from secateurs.planning import plan as planning
from secateurs.planning.machine import measured
from secateurs.runtime.convert import compressed_bytes

METHODS = ("wanda", "sparsegpt", "admm", "sparsellm")
SAMPLES, LENGTH, PATTERN = 32, 256, "50%"
BUNDLED = Path(demo.__file__).parent / "model"

LARGE: dict[str, Any] = {
    "7B, as Llama 2": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    ),
    "70B, as Llama 3": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    ),
    "30B-A3B, as Qwen3": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        max_position_embeddings=40960,
        dtype=torch.bfloat16,
    ),
}


KEPT: dict[tuple[str, str], Record] = {}
"""Runs that are not made again, by part and name."""


def compare(part: str, jobs: dict[Any, Record], rows: list[Record], about: Record, results: Path) -> None:
    """Plan and run each, and add it to the rows."""
    for name, job in jobs.items():
        method, samples = job["method"], job["samples"]
        own = ("tool", "model", "tokens", "output")
        said = secateurs.plan(
            job["model"], device="cpu", **{name: job[name] for name in job.keys() - set(own)}
        )
        if "tokens" in job:  # which say so themselves
            del job["samples"], job["length"]
        run = KEPT.get((part, name)) or in_processes({name: job}, 1)[name][0]
        above = run["peak_bytes"] - run["import_bytes"]
        row = {
            "part": part,
            "name": name,
            "method": method,
            "samples": samples,
            "planned": {"seconds": said.seconds, "bytes": said.host_bytes},
            "run": run,
            "seconds_ratio": said.total_seconds / run["processor_seconds"],
            "bytes_ratio": said.host_bytes / above,
        }
        if part == "options":
            if "compressed_bytes" not in run:
                run["compressed_bytes"] = compressed_bytes(job["output"])
            row["planned"]["compressed_bytes"] = said.compressed_bytes
            row["compressed_ratio"] = said.compressed_bytes / run["compressed_bytes"]
        rows.append(row)
        save(results, about, rows)
        cells = [name, method, said.total_seconds, run["processor_seconds"], row["seconds_ratio"]]
        print_row([*cells, said.host_bytes / 1e6, above / 1e6, row["bytes_ratio"]])


def job_of(model: Path, tokens: Path, output: Path, method: str, samples: int = SAMPLES) -> Record:
    return {
        "tool": "secateurs",
        "model": str(model),
        "tokens": str(tokens),
        "output": str(output),
        "method": method,
        "pattern": PATTERN,
        "samples": samples,
        "length": LENGTH,
    }


def against_runs(rows: list[Record], about: Record, results: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        models = {
            "bundled": BUNDLED,
            "width 512": random_llama(here / "512", 2, "bfloat16"),
            "width 512, float32": random_llama(here / "512-32", 2, "float32"),
            "width 1024": random_llama(here / "1024", 1, "bfloat16", width=1024, channels=2752),
            "8 experts": random_experts(here / "experts"),
        }
        tokens = {
            name: random_tokens(
                here / f"{number}.safetensors",
                SAMPLES,
                LENGTH,
                secateurs.Checkpoint(model).config["vocab_size"],
            )
            for number, (name, model) in enumerate(models.items())
        }
        jobs = {
            f"{name}, {method}": job_of(model, tokens[name], here / "pruned", method)
            for name, model in models.items()
            for method in METHODS
        }
        compare("run", jobs, rows, about, results)


OPTIONS: dict[str, Record] = {
    "--values int4": {"values": "int4"},
    "--values int4, sparsellm": {"values": "int4", "method": "sparsellm", "effort": "fast"},
    "--embedding int8": {"embedding": "int8"},
    "--budget 5MB": {"budget": "5MB"},
    "--allocation owl": {"allocation": "owl"},
    "--allocation sensitivity": {"allocation": "sensitivity"},
    "--calibration self": {"calibration": "self"},
    "--recover 65536": {"recover": 65536},
    "--recover 65536 --values int4": {"recover": 65536, "values": "int4"},
    "--experts 75%": {"experts": "75%"},
}
"""On top of SparseGPT on the bundled model, the last one on 8 experts."""


def options(rows: list[Record], about: Record, results: Path) -> None:
    """What else `prune` takes, one by one."""
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        for name, given in OPTIONS.items():
            model = random_experts(here / "experts") if "experts" in given else BUNDLED
            vocabulary = secateurs.Checkpoint(model).config["vocab_size"]
            tokens = random_tokens(here / "tokens.safetensors", SAMPLES, LENGTH, vocabulary)
            job = job_of(model, tokens, here / "pruned", "sparsegpt") | given
            if "budget" in given:
                del job["pattern"]
            if "calibration" in given:
                del job["tokens"]
            compare("options", {name: job}, rows, about, results)


def scaling(rows: list[Record], about: Record, results: Path) -> None:
    """Depth, width and samples, one at a time."""
    shapes = [(depth, 256, 16) for depth in (4, 16, 64)]
    shapes += [(4, width, 16) for width in (512, 1024)]
    shapes += [(4, 256, samples) for samples in (32, 64, 128)]
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        for depth, width, samples in shapes:
            model = random_llama(here / "model", depth, "bfloat16", width=width, channels=8 * width // 3)
            tokens = random_tokens(here / "tokens.safetensors", samples, LENGTH)
            job = job_of(model, tokens, here / "pruned", "sparsegpt", samples)
            name = f"{depth} blocks, width {width}, {samples} samples"
            compare("scaling", {name: job}, rows, about, results)


def large(rows: list[Record], about: Record, results: Path) -> None:
    """What is said of models that are not here, on cards that are not here."""
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in LARGE.items():
            config.save_pretrained(temporary)
            for device, ranks in (("h100", 1), ("h100", 8), ("rtx4090", 1)):
                for method in ("sparsegpt", "admm", "sparsellm"):
                    said = secateurs.plan(temporary, device=device, ranks=ranks, method=method)
                    row = {"part": "large", "name": name, "device": device, "ranks": ranks, "method": method}
                    row |= {"seconds": said.total_seconds, "device_bytes": said.device_bytes}
                    row |= {"host_bytes": said.host_bytes, "disk_bytes": said.disk_bytes}
                    row |= {"activations_on": said.activations_on, "fits": said.fits}
                    rows.append(row)
                    minutes, sizes = said.total_seconds / 60, (said.device_bytes, said.host_bytes)
                    cells = [name, f"{ranks} x {device}", method, minutes, *(size / 1e9 for size in sizes)]
                    print_row([*cells, "yes" if said.fits else "no"])
            save(results, about, rows)


RECORDED: dict[str, Record] = {
    "sparsegpt": {"method": "sparsegpt"},
    "admm": {"method": "admm"},
    "sparsellm, sparsegpt": {"method": "sparsellm:solver=sparsegpt,iterations=4", "target": "layer"},
    "sparsellm": {"method": "sparsellm:iterations=4"},
}
"""What prune_gpu.py ran, as the defaults were then; but for the descent, which was another."""


def recorded(rows: list[Record], about: Record, results: Path) -> None:
    """Beside what an H200 took: of all phases but refine, which is another since, and of memory."""
    found = json.loads((RESULTS / "gpu_prune.json").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        LARGE["7B, as Llama 2"].save_pretrained(temporary)
        for run in found["rows"]:
            settings = RECORDED[run["method"]]
            said = secateurs.plan(temporary, device="h200", length=2048, pattern="70%", refine=0, **settings)
            took = sum(seconds for phase, seconds in run["phases"].items() if phase != "refine")
            ratios = said.total_seconds / took, said.device_bytes / run["peak_bytes"]
            row = {"part": "recorded", "method": run["method"], "planned": said.seconds}
            row |= {"run": run["phases"], "seconds_ratio": ratios[0], "bytes_ratio": ratios[1]}
            rows.append(row | {"planned_bytes": said.device_bytes, "run_bytes": run["peak_bytes"]})
            cells = ["7B on an H200", run["method"], said.total_seconds, took, ratios[0]]
            print_row([*cells, said.device_bytes / 1e6, run["peak_bytes"] / 1e6, ratios[1]])
    save(results, about, rows)


PARTS = {"run": against_runs, "options": options, "scaling": scaling, "large": large, "recorded": recorded}


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS / "plan.json")
    parser.add_argument("--keep-runs", action="store_true", help="that the results have, and plan them anew")
    settings = parser.parse_args()
    about = environment() | {"samples": SAMPLES, "length": LENGTH, "pattern": PATTERN}
    about["threads"] = torch.get_num_threads()
    about["rates"] = measured("cpu", torch.bfloat16).rates
    rows: list[Record] = []
    if settings.keep_runs:
        found = (row for row in load(settings.results) if "name" in row and "run" in row)
        KEPT.update({(row["part"], row["name"]): row["run"] for row in found})
    header = ["", "method", "planned s", "s", "ratio", "planned MB", "MB", "ratio"]
    with patch.object(planning, "measured", cache(measured)):  # the test is the same for all
        for part in settings.only:
            large_ones = ["model", "device", "method", "minutes", "card GB", "host GB", "fits"]
            print_table(large_ones if part == "large" else header, [])
            PARTS[part](rows, about, settings.results)


if __name__ == "__main__":
    main()
