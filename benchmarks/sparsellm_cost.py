"""SparseLLM's seconds and memory on a processor, by depth and by the dtype of the model's weights.

The model is a Llama of width 512 and MLP 1376 with random weights; 32 x 256 calibration tokens; 70 %; four
iterations. "as published" has SparseGPT inside and each MLP's own output as the target; "dense" aims at the
dense model; "default" is what `secateurs prune` does, with ADMM inside and the descent, "fast" and "best" the
same with that effort, and "admm" ADMM alone. Each run has a process of its own; the clock covers loading,
pruning and writing, not the imports. Beside the peak stands what it is above the imports and the model's own
bytes.

    python benchmarks/sparsellm_cost.py

Given a checkout of github.com/BaiTheBest/SparseLLM, its code, which has no bfloat16, runs in turn with ours
on the same float32 model and tokens: "published" with our four iterations (see `published_sparsellm` in
job.py). The ratios are those of its median seconds to those of "as published".

    python benchmarks/sparsellm_cost.py --published ../SparseLLM
"""

import tempfile
from pathlib import Path
from typing import Literal

import tyro

from common import RESULTS, Record, environment, middle, print_table, save
from job import in_processes
from random_models import random_llama, random_tokens


def main(
    depths: tuple[int, ...] = (2, 8),
    samples: int = 32,
    length: int = 256,
    methods: tuple[Literal["as published", "dense", "default", "fast", "best", "admm"], ...] = (),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    repetitions: int = 3,
    results: Path = RESULTS / "sparsellm_cost.json",
    published: Path | None = None,
) -> None:
    about = {**environment(), "samples": samples, "length": length, "pattern": "70%", "iterations": 4}
    ours = {"tool": "secateurs", "method": "sparsellm:solver=sparsegpt,iterations=4"}
    tools: dict[str, Record] = {
        "as published": {**ours, "target": "layer"},
        "dense": {**ours, "target": "dense", "refine": 0},
        "default": {"tool": "secateurs", "method": "sparsellm"},
        "fast": {"tool": "secateurs", "method": "sparsellm", "effort": "fast"},
        "best": {"tool": "secateurs", "method": "sparsellm", "effort": "best"},
        "admm": {"tool": "secateurs", "method": "admm"},
    }
    tools = {name: tools[name] for name in methods or ("as published", "dense", "default")}
    rows: list[Record] = []
    table = []
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        tokens = random_tokens(here / "ids.safetensors", samples, length)
        for depth in depths:
            models = {dtype: random_llama(here / f"{depth}_{dtype}", depth, dtype) for dtype in dtypes}
            kinds = {(name, dtype): tool for dtype in dtypes for name, tool in tools.items()}
            if published:
                theirs = {"tool": "published_sparsellm", "repository": str(published), "iterations": 4}
                kinds["published", "float32"] = theirs
            shared = {"tokens": str(tokens), "pattern": "70%", "output": str(here / "out")}
            jobs = {kind: {**shared, **tool, "model": str(models[kind[1]])} for kind, tool in kinds.items()}
            seconds = {}
            for (name, dtype), repeated in in_processes(jobs, repetitions).items():
                size = sum(file.stat().st_size for file in models[dtype].glob("*.safetensors"))
                kind = {"blocks": depth, "method": name, "dtype": dtype, "model_bytes": size}
                rows.append({**kind, "runs": repeated})
                seconds[name, dtype] = middle(repeated, "seconds")
                peak, imports = middle(repeated, "peak_bytes"), middle(repeated, "import_bytes")
                megabytes = [held / 1e6 for held in (peak, imports, size, peak - imports - size)]
                table.append([depth, name, dtype, seconds[name, dtype], *megabytes])
            save(results, about, rows)
            ratios += [
                f"{depth} blocks: published (float32) / as published ({dtype}) "
                f"{seconds['published', 'float32'] / seconds['as published', dtype]:.2f} in seconds"
                for dtype in dtypes
                if published and ("as published", dtype) in seconds
            ]
    print_table(
        ["blocks", "method", "dtype", "seconds", "peak MB", "imports MB", "model MB", "above both MB"], table
    )
    for ratio in ratios:
        print(ratio)


if __name__ == "__main__":
    tyro.cli(main)
