"""Perplexity by method and pattern on real models, over several calibration samples.

Every combination is pruned and saved, loaded back by transformers, searched for NaN and Inf, and measured
on the first windows of each text: perplexity, and the divergence of the dense model's predictions from the
pruned one's. (Where the dense model knows a text badly it is too sure of itself, and what changes its
predictions may lower perplexity: the divergence then tells how much of the model is left, and "tempered"
perplexity, at the temperature that suits the text best, how it predicts beside its sureness.) The tables
show the mean over the seeds, and each method's margin over the base in log-perplexity (below zero is
better), paired by seed: mean (least to most). A combination in the results is not repeated: interrupt at
will, and run the same command again. Each row names the revision that was measured.

    python benchmarks/quality.py --models ../out/llama ../out/opt --calibration ../data/wikitext-2/valid.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt

An allocation goes after a slash: --methods admm admm/owl admm/sensitivity. What each part of SparseLLM adds,
one after the other, in the same walk:

    python benchmarks/quality.py ... --methods sparsegpt +sequential +fit +iterations +dense +refinement \
        +allocation admm sparsellm everything --results benchmarks/results/ablation.json
"""

import math
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean

import torch
import tyro
from transformers import AutoTokenizer

import secateurs
from common import RESULTS, Record, environment, load, print_table, save
from scores import divergences, perplexities, tempered
from secateurs.pruning.block.local import Sequential
from secateurs.text import calibration_blocks, evaluation_tokens

Cell = tuple[str, str, int | None]  # method, pattern, calibration seed
DENSE: Cell = ("dense", "0%", None)

AROUND_SPARSEGPT = "sparsellm:solver=sparsegpt,iterations=4"

RUNGS: dict[str, Record] = {
    "+sequential": {"method": "sparsegpt", "sequential": "linear"},
    "+fit": {"method": "sparsegpt", "target": "block"},
    "+iterations": {"method": AROUND_SPARSEGPT, "target": "block", "refine": 0},
    "+dense": {"method": AROUND_SPARSEGPT, "target": "dense", "refine": 0},
    "+refinement": {"method": AROUND_SPARSEGPT, "target": "dense"},
    "+allocation": {"method": AROUND_SPARSEGPT, "target": "dense", "allocation": "sensitivity"},
    "sparsellm": {"method": "sparsellm"},
    "sparsellm fast": {"method": "sparsellm", "effort": "fast"},
    "sparsellm best": {"method": "sparsellm", "effort": "best"},
    "everything": {"method": "sparsellm", "allocation": "sensitivity"},
}
"""What `secateurs.prune` is given for methods that are more than a name."""


def grid(methods: tuple[str, ...], patterns: tuple[str, ...], seeds: tuple[int, ...]) -> list[Cell]:
    """The dense model, then every method, pattern and seed; magnitude, which reads no text, only once."""
    cells = [DENSE]
    for pattern, method in product(patterns, methods):
        cells += [(method, pattern, seed) for seed in ((None,) if method == "magnitude" else seeds)]
    return cells


def measure(
    model: Path,
    cell: Cell,
    ids: dict[int | None, torch.Tensor],
    texts: dict[str, torch.Tensor],
    length: int,
    sequential: Sequential,
) -> Record:
    """Prune, save, load and evaluate one cell of the grid."""
    if cell == DENSE:
        return {
            "perplexity": perplexities(model, texts, length),
            "tempered": tempered(model, texts, length),
        }
    method, pattern, seed = cell
    name, _, allocation = method.partition("/")
    settings = RUNGS.get(name, {"method": name, "sequential": sequential})
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "pruned"
        report = secateurs.prune(
            model,
            output=output,
            calibration=ids.get(seed),
            pattern=pattern,
            **(settings | {"allocation": allocation} if allocation else settings),
        )
        return {
            "perplexity": perplexities(output, texts, length),
            "tempered": tempered(output, texts, length),
            "divergence": divergences(model, output, texts, length),
            "sparsity": report.sparsity,
            "seconds": report.seconds,
            "error": mean(layer.error for layer in report.layers),
        }


def by_seed(scores: dict[Cell, float], method: str, pattern: str) -> dict[int | None, float]:
    return {cell[2]: score for cell, score in scores.items() if cell[:2] == (method, pattern)}


def margin(own: dict[int | None, float], base: dict[int | None, float]) -> str:
    """Of log-perplexities, paired by seed; a method without seeds meets each of the other's."""
    pairs = [(own.get(seed, own.get(None)), score) for seed, score in base.items()]
    margins = [math.log(mine / other) for mine, other in pairs if mine is not None]
    return f"{mean(margins):+.3f} ({min(margins):+.3f} to {max(margins):+.3f})" if margins else ""


def figure(row: Record, kind: str, text: str) -> float | None:
    """None where an older row has none."""
    if kind == "tempered perplexity":
        return row["tempered"][text]["perplexity"] if "tempered" in row else None
    return row[kind][text] if kind in row else None


def print_tables(rows: list[Record], methods: tuple[str, ...], patterns: tuple[str, ...], base: str) -> None:
    """Of perplexities, tempered ones and divergences, one each for each model and text."""
    rivals = [method for method in methods if method != base]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        for text in own[0]["perplexity"]:
            for kind in ("perplexity", "tempered perplexity", "divergence"):
                scores = {
                    (row["method"], row["pattern"], row["seed"]): score
                    for row in own
                    if (score := figure(row, kind, text)) is not None
                }
                if not scores:
                    continue  # older rows have no tempered perplexity
                table = []
                for pattern in patterns:
                    found = {method: by_seed(scores, method, pattern) for method in methods}
                    means = [mean(found[method].values()) if found[method] else "" for method in methods]
                    margins = [margin(found[method], by_seed(scores, base, pattern)) for method in rivals]
                    table.append([pattern, *means, *(margins if kind != "divergence" else [])])
                dense = f" ({scores[DENSE]:.2f} dense)" if DENSE in scores else ""
                against = [f"{method} - {base}" for method in rivals] if kind != "divergence" else []
                print(f"\n{kind} of {model} on {text}{dense}\n")
                print_table(["pattern", *methods, *against], table)


def main(
    models: tuple[Path, ...],
    calibration: Path,
    texts: tuple[Path, ...],
    patterns: tuple[str, ...] = ("50%", "60%", "70%", "80%", "90%", "2:4", "4:8", "1:4"),
    methods: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt", "admm"),
    seeds: tuple[int, ...] = (0, 1, 2),
    samples: int = 64,
    length: int = 512,
    windows: int = 64,
    sequential: Sequential = "block",
    base: str = "sparsegpt",
    results: Path = RESULTS / "quality.json",
) -> None:
    settings = {
        "calibration": calibration.name,
        "texts": [text.name for text in texts],
        "samples": samples,
        "length": length,
        "windows": windows,
        "sequential": sequential,
    }
    about = {**environment(), **settings}
    rows = load(results, settings)
    done = {(row["model"], row["method"], row["pattern"], row["seed"]) for row in rows}
    for model in models:
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids: dict[int | None, torch.Tensor] = {
            seed: calibration_blocks(calibration, tokenizer, samples=samples, length=length, seed=seed)
            for seed in seeds
        }
        evaluation = {text.stem: evaluation_tokens(text, tokenizer)[: windows * length] for text in texts}
        for cell in grid(methods, patterns, seeds):
            if (model.name, *cell) in done:
                continue
            row = {"model": model.name, **dict(zip(("method", "pattern", "seed"), cell, strict=True))}
            measured = measure(model, cell, ids, evaluation, length, sequential)
            rows.append({**row, **measured, "revision": about["revision"]})
            save(results, about, rows)
            scores = (f"{text} {score:.2f}" for text, score in rows[-1]["perplexity"].items())
            print(*row.values(), *scores, flush=True)
    print_tables(rows, methods, patterns, base)


if __name__ == "__main__":
    tyro.cli(main)
