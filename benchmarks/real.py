"""Published models, pruned and measured: our methods and llm-compressor's, on the same tokens and machine.

A cell is one method at one pattern. Each is pruned in a process of its own (seconds and peak memory are
that process's), then measured as transformers loads it: perplexity of whole texts (or of windows all over
them), the divergence of the dense model's predictions from the pruned one's, and lm-eval's accuracy on
zero-shot questions with standard errors, the same questions for all. Each cell has a JSON file, which is
written as its parts come: interrupt at will, and the same command goes on where it stopped.

    python benchmarks/real.py --cache ../cache --peer-python ../venv-peer/bin/python \
        --calibration ../data/wikitext-2/train.txt --questions ../data/tasks ../data/piqa \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt

`--estimate` measures a small part of each cell and prints what the whole would take; `--table` prints what is
in the results.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import secateurs
from common import RESULTS, Record, environment, load, print_table, save
from job import in_processes
from published import MODELS, published_model, write_questions
from scores import causal_model, divergences, perplexities
from secateurs.checkpoint import resolve
from secateurs.text import bos_id, calibration_blocks, evaluation_tokens, wants_bos

METHODS: dict[str, Record] = {
    "magnitude": {"tool": "secateurs", "method": "magnitude"},
    "wanda": {"tool": "secateurs", "method": "wanda"},
    "llmcompressor-wanda": {"tool": "llmcompressor", "method": "wanda"},
    "sparsegpt": {"tool": "secateurs", "method": "sparsegpt"},
    "llmcompressor-sparsegpt": {"tool": "llmcompressor", "method": "sparsegpt"},
    "admm": {"tool": "secateurs", "method": "admm"},
    "sparsellm": {"tool": "secateurs", "method": "sparsellm"},
}
VARIANTS: dict[str, Record] = {
    "sparsellm-fast": {"method": "sparsellm", "effort": "fast"},
    "sparsellm-best": {"method": "sparsellm", "effort": "best"},
    "sparsellm-no-descent": {"method": "sparsellm", "refine": 0},
    "sparsellm-block": {"method": "sparsellm", "target": "block"},
    "sparsellm-block-no-descent": {"method": "sparsellm", "target": "block", "refine": 0},
    "sparsellm-repair-1": {"method": "sparsellm", "repair": 1.0},
    "sparsellm-sparsegpt": {"method": "sparsellm:solver=sparsegpt"},
    "admm-linear": {"method": "admm", "sequential": "linear"},
}
"""Of our default, to see which part of it does what."""
METHODS |= {name: {"tool": "secateurs", **settings} for name, settings in VARIANTS.items()}

TASKS = {
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "winogrande": "WinoGrande",
    "openbookqa": "OpenBookQA",
}


DIVERGENCE_WINDOWS = 8
"""Of each text; the dense model runs too."""


def spread(tokens: torch.Tensor, length: int, windows: int | None) -> torch.Tensor:
    """So many windows of a text, evenly from beginning to end, or the whole."""
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    if windows is None or windows >= len(whole):
        return tokens
    return whole[torch.arange(windows) * len(whole) // windows].flatten()


class Bench:
    """One model with its texts, and where its results go."""

    def __init__(
        self,
        name: str,
        folder: Path,
        cache: Path,
        calibration: Path,
        texts: tuple[Path, ...],
        settings: Record,
    ) -> None:
        self.name, self.folder, self.settings = name, folder, settings
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model_type = AutoConfig.from_pretrained(folder).model_type
        self.bos = bos_id(tokenizer) if wants_bos(model_type) else None
        samples, length, windows = (settings[name] for name in ("samples", "length", "windows"))
        self.ids = calibration_blocks(
            calibration, tokenizer, samples=samples, length=length, bos=self.bos is not None
        )
        tokens = {text.stem: evaluation_tokens(text, tokenizer) for text in texts}
        self.texts = {name: spread(ids, length, windows) for name, ids in tokens.items()}
        self.few = {name: spread(ids, length, DIVERGENCE_WINDOWS) for name, ids in tokens.items()}
        self.work = cache / f"{name} {samples}x{length}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.tokens = self._tokens(samples)

    def _tokens(self, samples: int) -> Path:
        file = self.work / f"{samples}.safetensors"
        save_file({"ids": self.ids[:samples].contiguous()}, file)
        return file

    def job(self, method: str, pattern: str, output: Path) -> Record:
        tokens = None if method == "magnitude" else str(self.tokens)
        return {
            "model": str(self.folder),
            "tokens": tokens,
            "output": str(output),
            "pattern": pattern,
            **METHODS[method],
        }

    def predictions(self, output: Path | None) -> Record:
        """Perplexity and divergence, of the dense model without an output."""
        start = time.perf_counter()
        length = self.settings["length"]
        found = {"perplexity": perplexities(output or self.folder, self.texts, length, self.bos)}
        if output:
            found["divergence"] = divergences(
                self.folder, output, self.few, length, DIVERGENCE_WINDOWS, self.bos
            )
        return {**found, "predictions_seconds": time.perf_counter() - start}

    def answers(self, output: Path | None, tasks: list[str], questions: Path) -> Record:
        start = time.perf_counter()
        found = secateurs.evaluate_tasks(
            causal_model(output or self.folder),
            AutoTokenizer.from_pretrained(self.folder),
            tasks,
            task_data=questions,
        )
        return {"tasks": found, "tasks_seconds": time.perf_counter() - start}

    def estimate(self, pythons: dict[str, str], methods: tuple[str, ...], blocks: int = 2) -> None:
        """Seconds that pruning takes by each method, from two small runs on the first blocks.

        What a block takes is a part that grows with the tokens and one that does not.
        """
        config = AutoConfig.from_pretrained(self.folder)
        depth = config.get_text_config().num_hidden_layers
        config.get_text_config().update({"num_hidden_layers": blocks, "layer_types": None})
        shallow, whole = self.work / "shallow", self.folder
        AutoModelForCausalLM.from_pretrained(whole, config=config, dtype="auto").save_pretrained(shallow)
        AutoTokenizer.from_pretrained(whole).save_pretrained(shallow)
        self.folder, tokens, samples = shallow, self.tokens, self.settings["samples"]
        few, more = max(2, samples // 64), max(4, samples // 8)
        rows = []
        for method in methods:
            runs = []
            for count in (few, more):
                self.tokens = self._tokens(count)
                jobs = {method: self.job(method, "50%", self.work / "estimate")}
                runs.append(in_processes(jobs, 1, pythons)[method][0])
            # On a busy machine a small difference of times of day says nothing.
            first, second = (found["processor_seconds"] for found in runs)
            slope = max(0.0, second - first) / (more - few)
            seconds = (runs[0]["seconds"] + slope * (samples - few)) * depth / blocks
            rows.append([method, *(found["seconds"] for found in runs), seconds, seconds / depth])
        print_table(["method", f"{few} samples, s", f"{more} samples, s", "whole, s", "a block, s"], rows)
        self.folder, self.tokens = whole, tokens
        length = self.settings["length"]
        start = time.perf_counter()
        perplexities(whole, {"": next(iter(self.texts.values()))[: 4 * length]}, length)
        window = (time.perf_counter() - start) / 4
        windows = sum(len(tokens) // length for tokens in self.texts.values())
        print(f"\nperplexity of {windows} windows: {window * windows:.0f} s")
        print(f"divergence: {window * 2 * DIVERGENCE_WINDOWS * len(self.texts):.0f} s")


def cell_file(results: Path, model: str, pattern: str, method: str) -> Path:
    """A file's name has no colons."""
    return results / model / f"{pattern.replace(':', 'of').rstrip('%')}-{method}.json"


def run(
    bench: Bench,
    cells: list[tuple[str, str]],
    pythons: dict[str, str],
    questions: tuple[list[str], Path],
    results: Path,
) -> None:
    """Bring all cells up to date: predictions of all first, then answers.

    A cell's file says of each part where and when it was measured, since they may come from several runs.
    """
    here = environment()
    for part, (method, pattern) in product(("predictions", "tasks"), cells):
        file = cell_file(results, bench.name, pattern, method)
        earlier = load(file, bench.settings)
        row = earlier[0] if earlier else {"model": bench.name, "method": method, "pattern": pattern}
        measured = row.setdefault("measured", {})
        if f"{part}_seconds" in row or (part == "tasks" and not questions[0]):
            continue
        output = None if method == "dense" else bench.work / file.stem
        if output and not (output.exists() and "pruning" in row):
            row["pruning"] = in_processes({method: bench.job(method, pattern, output)}, 1, pythons)[method][0]
            measured["pruning"] = here
            save(file, bench.settings, [row])
        row |= bench.predictions(output) if part == "predictions" else bench.answers(output, *questions)
        measured[part] = here
        save(file, bench.settings, [row])
        print(json.dumps(row), flush=True)
        if output and part == "tasks":
            shutil.rmtree(output)


def accuracy(metrics: dict[str, float]) -> tuple[float, float]:
    """Normalised by the length of the answers where lm-eval does so; with its standard error."""
    name = "acc_norm" if "acc_norm" in metrics else "acc"
    return metrics[name], metrics[f"{name}_stderr"]


def print_results(results: Path) -> None:
    """A table for each model, from the files of its cells."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        rows = [json.loads(file.read_text())["rows"][0] for file in folder.glob("*.json")]
        rows = [row for row in rows if "perplexity" in row]
        order = {method: place for place, method in enumerate(["dense", *METHODS])}
        rows.sort(
            key=lambda row: (
                row["pattern"] != "0%",
                ":" in row["pattern"],
                row["pattern"],
                order[row["method"]],
            )
        )
        texts = list(rows[0]["perplexity"])
        tasks = [task for task in TASKS if any(task in row.get("tasks", {}) for row in rows)]
        header = [
            "zeros",
            "method",
            *texts,
            *(f"KL {text}" for text in texts),
            *(TASKS[task] for task in tasks),
        ]
        print(f"\n{folder.name}\n")
        print_table(
            [*header, "mean", "seconds", "peak MB"], [list(_cells(row, texts, tasks)) for row in rows]
        )


def _cells(row: Record, texts: list[str], tasks: list[str]) -> Iterator[Any]:
    yield from (row["pattern"], row["method"])
    yield from (f"{row['perplexity'][text]:.2f}" for text in texts)
    yield from (f"{row['divergence'][text]:.3f}" if "divergence" in row else "" for text in texts)
    found = [accuracy(row["tasks"][task]) for task in tasks] if "tasks" in row else []
    yield from (f"{100 * share:.1f} ± {100 * error:.1f}" for share, error in found)
    if found:
        error = math.sqrt(sum(error**2 for _, error in found)) / len(found)
        yield f"{100 * mean(share for share, _ in found):.1f} ± {100 * error:.1f}"
    else:
        yield from [""] * (len(tasks) + 1)
    pruning = row.get("pruning")
    yield from (f"{pruning['seconds']:.0f}", f"{pruning['peak_bytes'] / 1e6:.0f}") if pruning else ("", "")


def main(
    cache: Path | None = None,
    peer_python: Path | None = None,
    calibration: Path | None = None,
    texts: tuple[Path, ...] = (),
    questions: tuple[Path, ...] = (),
    models: tuple[str, ...] = ("SmolLM2-135M-Instruct",),
    methods: tuple[str, ...] = tuple(name for name in METHODS if name not in VARIANTS),
    patterns: tuple[str, ...] = ("50%", "2:4", "60%", "70%", "4:8"),
    samples: int = 128,
    length: int = 1024,
    windows: int | None = None,
    limit: int | None = None,
    estimate: bool = False,
    table: bool = False,
    results: Path = RESULTS / "real",
) -> None:
    """See above.

    Args:
        cache: keeps the models that pip brings, and pruned ones until they are measured.
        peer_python: the interpreter of the environment that llm-compressor is in.
        calibration: a text that no other is measured on.
        texts: to measure perplexity and divergence on.
        questions: folders with the tasks' questions.
        models: names of published ones, or folders.
        windows: of each text, evenly from beginning to end; all by default.
        limit: questions of a task, drawn at random; all by default.
    """
    if table:
        print_results(results)
        return
    if cache is None or calibration is None:
        raise SystemExit("give --cache and --calibration")
    if calibration in texts:
        raise SystemExit(f"{calibration} is to be measured on: calibrate on another text")
    torch.manual_seed(0)
    settings = {"samples": samples, "length": length, "windows": windows, "limit": limit}
    settings |= {"calibration": calibration.name, "texts": [text.name for text in texts]}
    settings["divergence_windows"] = DIVERGENCE_WINDOWS
    asked = cache / f"questions-{limit}"
    tasks = write_questions(questions, asked, limit)
    pythons = {name: str(peer_python) for name, job in METHODS.items() if job["tool"] == "llmcompressor"}
    for model in models:
        folder = Path(resolve(published_model(model, cache))) if model in MODELS else Path(model)
        name = model if model in MODELS else folder.name
        bench = Bench(name, folder, cache, calibration, texts, settings)
        if estimate:
            bench.estimate(pythons, methods)
            continue
        cells = [(method, pattern) for pattern in patterns for method in methods]
        run(bench, [("dense", "0%"), *cells], pythons, (tasks, asked), results)
    if not estimate:
        print_results(results)


if __name__ == "__main__":
    tyro.cli(main)
