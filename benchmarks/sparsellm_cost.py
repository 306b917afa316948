"""SparseLLM's seconds and memory on a processor, by depth.

The model is a Llama of width 512 and MLP 1376 with random weights; 32 x 256 calibration tokens; 70 %; four
iterations. "as published" has SparseGPT inside and each MLP's own output as the target; "dense" aims at the
dense model; "default" is what `secateurs prune` does, with ADMM inside and refinement. Each run has a process
of its own; the clock covers loading, pruning and writing, not the imports. Beside the peak stands what it is
above the imports and the model's own bytes.

    python benchmarks/sparsellm_cost.py

Given a checkout of github.com/BaiTheBest/SparseLLM, its code runs in turn with ours on the same model and
tokens: "published" with our four iterations (see `published_sparsellm` in job.py). The ratio is that of its
median seconds to those of "as published".

    python benchmarks/sparsellm_cost.py --published ../SparseLLM
"""

import tempfile
from pathlib import Path
from typing import Literal

import tyro

from common import (
    RESULTS,
    Record,
    alternate,
    environment,
    middle,
    print_table,
    random_llama,
    random_tokens,
    save,
)


def main(
    depths: tuple[int, ...] = (2, 8),
    samples: int = 32,
    length: int = 256,
    methods: tuple[Literal["as published", "dense", "default"], ...] = (),
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
    }
    if methods:
        tools = {name: tools[name] for name in methods}
    if published:
        tools["published"] = {"tool": "published_sparsellm", "repository": str(published), "iterations": 4}
    rows: list[Record] = []
    table = []
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        tokens = random_tokens(here / "ids.safetensors", samples, length)
        for depth in depths:
            model = random_llama(here / str(depth), layers=depth, dtype="float32")
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            shared = {"model": str(model), "tokens": str(tokens), "pattern": "70%"}
            jobs = {name: {**shared, **tool, "output": str(here / "out")} for name, tool in tools.items()}
            done = alternate(jobs, repetitions)
            for name, runs in done.items():
                rows.append({"blocks": depth, "method": name, "model_bytes": size, "runs": runs})
                peak, imports = middle(runs, "peak_bytes"), middle(runs, "import_bytes")
                above = (peak - imports - size) / 1e6
                table.append(
                    [depth, name, middle(runs, "seconds"), peak / 1e6, imports / 1e6, size / 1e6, above]
                )
            save(results, about, rows)
            if published and "as published" in done:
                theirs, base = (middle(done[name], "seconds") for name in ("published", "as published"))
                ratios.append(f"{depth} blocks: published / as published {theirs / base:.2f} in seconds")
    print_table(["blocks", "method", "seconds", "peak MB", "imports MB", "model MB", "above both MB"], table)
    for ratio in ratios:
        print(ratio)


if __name__ == "__main__":
    tyro.cli(main)
