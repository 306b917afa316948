"""Perplexity by allocation: the same method and the same zeros, shared out between layers in different ways.

The table shows the mean over the calibration seeds, and each allocation's margin over the first in
log-perplexity (below zero is better), paired by seed: mean (least to most). A combination in the results is
not repeated: interrupt at will, and run the same command again.

    python benchmarks/allocation.py --model src/secateurs/demo/model \
        --calibration ../data/wikitext-2/valid.txt \
        --text ../data/books/The-Adventures-of-Sherlock-Holmes_1661.txt \
        --results benchmarks/results/allocation_llama.json
"""

import math
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean

import tyro
from transformers import AutoTokenizer

import secateurs
from common import RESULTS, Record, environment, load, perplexities, print_table, save
from secateurs.pruning.local import Sequential
from secateurs.text import calibration_blocks, evaluation_tokens


def print_tables(rows: list[Record], allocations: tuple[str, ...]) -> None:
    """One for each method: a line for each pattern."""
    base, *rivals = allocations
    for method in dict.fromkeys(row["method"] for row in rows):
        table = []
        for pattern in dict.fromkeys(row["pattern"] for row in rows if row["method"] == method):
            of = {
                (row["allocation"], row["seed"]): row["perplexity"]
                for row in rows
                if (row["method"], row["pattern"]) == (method, pattern)
            }
            seeds = sorted({seed for allocation, seed in of if allocation == base})
            means: list[object] = []
            margins = []
            for allocation in allocations:
                found = [of[allocation, seed] for seed in seeds if (allocation, seed) in of]
                means.append(mean(found) if found else "")
            for allocation in rivals:
                paired = [
                    math.log(of[allocation, seed] / of[base, seed])
                    for seed in seeds
                    if (allocation, seed) in of
                ]
                margins.append(
                    f"{mean(paired):+.3f} ({min(paired):+.3f} to {max(paired):+.3f})" if paired else ""
                )
            table.append([pattern, len(seeds), *means, *margins])
        print(f"\n{method}\n")
        print_table(["pattern", "seeds", *allocations, *(f"{rival} - {base}" for rival in rivals)], table)


def main(
    model: Path,
    calibration: Path,
    text: Path,
    patterns: tuple[str, ...] = ("70%", "90%", "50%", "80%", "4:8", "2:4"),
    methods: tuple[str, ...] = ("sparsegpt",),
    allocations: tuple[str, ...] = ("uniform", "owl", "sensitivity"),
    seeds: tuple[int, ...] = (0, 1, 2),
    samples: int = 32,
    length: int = 512,
    windows: int = 64,
    sequential: Sequential = "sublayer",
    results: Path = RESULTS / "allocation.json",
) -> None:
    about = {
        **environment(),
        "model": model.name,
        "calibration": calibration.name,
        "text": text.name,
        "samples": samples,
        "length": length,
        "windows": windows,
        "sequential": sequential,
    }
    rows = load(results)
    done = {(row["method"], row["pattern"], row["allocation"], row["seed"]) for row in rows}
    tokenizer = AutoTokenizer.from_pretrained(model)
    evaluation = {"text": evaluation_tokens(text, tokenizer)[: windows * length]}
    for seed, method, pattern, allocation in product(seeds, methods, patterns, allocations):
        if (method, pattern, allocation, seed) in done:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            report = secateurs.prune(
                model,
                output=Path(temporary) / "pruned",
                calibration=calibration_blocks(
                    calibration, tokenizer, samples=samples, length=length, seed=seed
                ),
                method=method,
                pattern=pattern,
                allocation=allocation,
                sequential=sequential,
            )
            row = {"method": method, "pattern": pattern, "allocation": allocation, "seed": seed}
            row["perplexity"] = perplexities(report.output, evaluation, length)["text"]
            row["seconds"] = report.seconds
            row["zeros"] = round(sum(layer.sparsity * layer.weights for layer in report.layers))
            row["layers"] = {layer.name: layer.pattern for layer in report.layers}
        rows.append(row)
        save(results, about, rows)
        print(
            method,
            pattern,
            allocation,
            seed,
            f"{row['perplexity']:.2f}",
            f"{report.seconds:.1f} s",
            flush=True,
        )
    print_tables(rows, allocations)


if __name__ == "__main__":
    tyro.cli(main)
