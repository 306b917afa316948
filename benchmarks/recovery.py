"""What recovery brings: perplexity and divergence from the dense model, by pattern, start, tokens and text.

A model is pruned (and rounded) by each method at each pattern and grid, and recovered on one text, a share of
which the dense model writes itself. Measured on texts that neither saw (or windows all over them), and if
questions are given, by lm-eval's zero-shot accuracy. What is in the results is not repeated: interrupt at
will, and run the same command again.

    python benchmarks/recovery.py --cache ../cache --calibration ../data/wikitext-2/valid.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt \
        --patterns 50% 70% 80% 90% 2:4 --tokens 0 300000 1000000 3000000 --learning-rate 3e-3

`--table` prints what is in the results.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoTokenizer

import secateurs
from calibration_text import sequences
from common import RESULTS, Record, environment, load, print_table, save
from published import write_questions
from real import TASKS, accuracy, spread
from scores import causal_model, divergences, perplexities
from secateurs.demo import MODEL
from secateurs.text import evaluation_tokens

KEYS = ("pattern", "values", "method", "self", "tokens")
AS_STORED = "as stored"
DIVERGENCE_WINDOWS = 16
"""Of each text; the dense model runs too."""


def print_results(rows: list[Record]) -> None:
    texts = list(rows[0]["perplexity"])
    tasks = [task for task in TASKS if any(task in row.get("tasks", {}) for row in rows)]
    header = [*KEYS, *texts, *(f"KL {text}" for text in texts), *(TASKS[task] for task in tasks), "seconds"]
    print_table(header, [list(_cells(row, texts, tasks)) for row in rows])


def _cells(row: Record, texts: list[str], tasks: list[str]) -> Iterator[Any]:
    yield from (_key(row, key) for key in KEYS)
    yield from (f"{row['perplexity'][text]:.2f}" for text in texts)
    yield from (f"{row['divergence'][text]:.3f}" for text in texts)
    for task in tasks:
        share, error = accuracy(row["tasks"][task]) if "tasks" in row else (float("nan"), 0.0)
        yield f"{100 * share:.1f} ± {100 * error:.1f}"
    yield f"{row['seconds']:.0f}" if "seconds" in row else ""


def _key(row: Record, key: str) -> Any:
    """Of a row that may be older than rounding is."""
    return row.get(key, AS_STORED) if key == "values" else row[key]


def main(
    cache: Path | None = None,
    calibration: Path | None = None,
    texts: tuple[Path, ...] = (),
    questions: tuple[Path, ...] = (),
    model: Path = MODEL,
    methods: tuple[str, ...] = ("sparsellm",),
    patterns: tuple[str, ...] = ("80%",),
    values: tuple[str, ...] = (AS_STORED,),
    shares: tuple[float, ...] = (0.5,),
    tokens: tuple[int, ...] = (0, 300_000, 1_000_000),
    pruned_on: int = 64,
    samples: int = 1024,
    length: int = 256,
    windows: int | None = None,
    window: int = 512,
    limit: int | None = None,
    learning_rate: float | None = None,
    table: bool = False,
    results: Path = RESULTS / "recovery" / "demo.json",
) -> None:
    """See above.

    Args:
        cache: keeps pruned models, and what the dense one writes.
        shares: of self-written text in what is recovered on.
        tokens: that are trained on.
        pruned_on: calibration sequences, all of the given text.
        samples: sequences to recover on.
        length: of a sequence.
        windows: of each text, evenly from beginning to end; all by default.
        window: tokens that perplexity is measured in.
        limit: questions of a task, drawn at random; all by default.
    """
    if table:
        print_results(load(results))
        return
    if cache is None or calibration is None:
        raise SystemExit("give --cache and --calibration")
    torch.manual_seed(0)
    settings = {
        "calibration": calibration.name,
        "texts": [text.name for text in texts],
        "pruned_on": pruned_on,
        "samples": samples,
        "length": length,
        "windows": windows,
        "window": window,
        "divergence_windows": DIVERGENCE_WINDOWS,
        "limit": limit,
        "learning_rate": learning_rate,
    }
    here = environment()
    rows = load(results, settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    name = "demo" if model == MODEL else model.name
    whole = {text.stem: evaluation_tokens(text, tokenizer) for text in texts}
    held_out = {name: spread(ids, window, windows) for name, ids in whole.items()}
    few = {name: spread(ids, window, DIVERGENCE_WINDOWS) for name, ids in whole.items()}
    asked = cache / f"questions-{limit}"
    tasks = write_questions(questions, asked, limit) if questions else []

    def measured(folder: Path) -> Record:
        found: Record = {
            "perplexity": perplexities(folder, held_out, window),
            "divergence": divergences(model, folder, few, window, DIVERGENCE_WINDOWS),
        }
        if tasks:
            found["tasks"] = secateurs.evaluate_tasks(causal_model(folder), tokenizer, tasks, task_data=asked)
        return found

    def keep(cell: Record, folder: Path, **of_run: Any) -> None:
        rows.append({**cell, **of_run, **measured(folder), "measured": here})
        save(results, settings, rows)
        print(rows[-1], flush=True)

    def is_missing(cell: Record) -> bool:
        return not any(all(_key(row, key) == cell[key] for key in KEYS) for row in rows)

    dense: Record = {"pattern": "0%", "values": AS_STORED, "method": "dense", "self": None, "tokens": 0}
    if is_missing(dense):
        keep(dense, model)
    for pattern, grid, method, count in product(patterns, values, methods, tokens):
        for share in shares if count else (None,):
            cell = {"pattern": pattern, "values": grid, "method": method, "self": share, "tokens": count}
            if not is_missing(cell):
                continue
            form = pattern.replace(":", "of").rstrip("%")
            form += "" if grid == AS_STORED else f"-{grid.replace(':', '-').replace('=', '')}"
            pruned = cache / f"{name}-{method}-{form}-{pruned_on}x{length}"
            if not pruned.exists():
                secateurs.prune(
                    model,
                    output=pruned,
                    calibration=calibration,
                    pattern=pattern,
                    method=method,
                    samples=pruned_on,
                    length=length,
                    values=None if grid == AS_STORED else grid,
                )
            if not count:
                keep(cell, pruned)
                continue
            assert share is not None
            sources = {str(calibration): 1 - share, "self": share}
            wanted = {source: part for source, part in sources.items() if part}
            output = cache / f"{pruned.name}-{share}-{count}"
            report = secateurs.recover(
                pruned,
                towards=model,
                calibration=sequences(model, wanted, samples, length, 1, cache),
                output=output,
                tokens=count,
                learning_rate=learning_rate,
            )
            of_run = {"seconds": report.seconds, "steps": report.steps}
            keep(cell, output, **of_run, before=report.before, after=report.after)
    print_results(rows)


if __name__ == "__main__":
    tyro.cli(main)
