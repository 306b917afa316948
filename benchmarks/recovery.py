"""What recovery brings: perplexity and divergence from the dense model, by tokens and text.

A model is pruned by each method on one text, and recovered on that text alone and on half of it and half that
the dense model wrote itself (plain sampling from its end-of-text token). Measured on the first windows of
texts that neither saw. A row in the results is not repeated: interrupt at will, and run the same command
again.

    python benchmarks/recovery.py --calibration ../data/wikitext-2/valid.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt
"""

import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import AutoTokenizer

import secateurs
from common import RESULTS, Record, environment, load, print_table, save
from scores import causal_model, divergences, perplexities
from secateurs.demo import MODEL
from secateurs.text import calibration_blocks, evaluation_tokens

AT_ONCE = 32


def self_written(folder: Path, samples: int, length: int, seed: int) -> Tensor:
    """(samples, length) ids that a model samples at temperature 1, each from its end-of-text token."""
    model = causal_model(folder)
    torch.manual_seed(seed)
    rows = []
    for first in range(0, samples, AT_ONCE):
        start = torch.full((min(AT_ONCE, samples - first), 1), model.config.eos_token_id)
        new: dict[str, Any] = {"max_new_tokens": length - 1, "min_new_tokens": length - 1}
        rows.append(model.generate(start, do_sample=True, top_k=0, pad_token_id=0, **new))
    return torch.cat(rows)


def main(
    calibration: Path,
    texts: tuple[Path, ...],
    model: Path = MODEL,
    methods: tuple[str, ...] = ("admm", "sparsellm"),
    pattern: str = "80%",
    tokens: tuple[int, ...] = (0, 300_000, 600_000),
    pruned_on: int = 64,
    samples: int = 512,
    length: int = 256,
    windows: int = 40,
    window: int = 512,
    learning_rate: float | None = None,
    results: Path = RESULTS / "recovery.json",
) -> None:
    settings = {
        "calibration": calibration.name,
        "texts": [text.name for text in texts],
        "pattern": pattern,
        "pruned_on": pruned_on,
        "samples": samples,
        "length": length,
        "windows": windows,
        "window": window,
        "learning_rate": learning_rate,
    }
    about = {**environment(), **settings}
    rows = load(results, settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    held_out = {text.stem: evaluation_tokens(text, tokenizer)[: windows * window] for text in texts}

    def measured(folder: Path, **what: Any) -> Record:
        parts = {name: ids[: 16 * window] for name, ids in held_out.items()}
        return {
            **what,
            "perplexity": perplexities(folder, held_out, window),
            "divergence": divergences(model, folder, parts, window),
        }

    def keep(row: Record) -> None:
        rows.append(row)
        save(results, about, rows)
        print(row, flush=True)

    def is_done(*cell: Any) -> bool:
        return any((row["method"], row["text"], row["tokens"]) == cell for row in rows)

    if not is_done("dense", "", 0):
        keep(measured(model, method="dense", text="", tokens=0))
    given = calibration_blocks(calibration, tokenizer, samples=samples, length=length, seed=1)
    with tempfile.TemporaryDirectory() as place:
        pruned = {method: Path(place) / method for method in methods}
        mixed: Tensor | None = None
        for count, method in product(tokens, methods):
            if not pruned[method].exists():
                of = {"pattern": pattern, "samples": pruned_on, "length": length, "device": "cpu"}
                secateurs.prune(
                    model,
                    output=pruned[method],
                    calibration=calibration,
                    pattern=pattern,
                    method=method,
                    **of,
                )
            if count == 0:
                if not is_done(method, "", 0):
                    keep(measured(pruned[method], method=method, text="", tokens=0))
                continue
            for text in ("given", "half self-written"):
                if is_done(method, text, count):
                    continue
                if text != "given" and mixed is None:
                    mixed = torch.cat([given[::2], self_written(model, samples // 2, length, seed=0)])
                output = Path(place) / f"{method}-{text[:4]}-{count}"
                report = secateurs.recover(
                    pruned[method],
                    towards=model,
                    calibration=given if text == "given" else mixed,
                    output=output,
                    tokens=count,
                    learning_rate=learning_rate,
                    device="cpu",
                )
                of_run = {"seconds": report.seconds, "steps": report.steps}
                held = {"before": report.before, "after": report.after}
                keep(measured(output, method=method, text=text, tokens=count, **of_run, **held))
    names = list(held_out)
    print_table(
        ["method", "text", "tokens", *names, *(f"divergence, {name}" for name in names), "seconds"],
        [
            [
                *(row["method"], row["text"], row["tokens"]),
                *(row[kind][name] for kind in ("perplexity", "divergence") for name in names),
                row.get("seconds", ""),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
