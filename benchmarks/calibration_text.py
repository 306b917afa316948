"""What calibration text does to a pruned model: a given text, what the model writes itself, or some of each.

Every combination is pruned, saved, loaded by transformers and measured on the first windows of two texts: one
like the given text, one that is unlike it. A combination in the results is not repeated: interrupt at will.

    python benchmarks/calibration_text.py --models src/secateurs/demo/model benchmarks/models/opt \
        --given ../data/wikitext-2/valid.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt \
        --cache ../cache --methods sparsellm --patterns 70% 80%

The columns of the table are the texts' perplexities and the mean of their logarithms over the dense model's.
"""

import math
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro
from transformers import AutoTokenizer

import secateurs
from common import RESULTS, Record, environment, load, print_table, save
from scores import perplexities
from secateurs.calibration.sequences import calibration_text
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import read_config
from secateurs.device import resolve_device
from secateurs.text import evaluation_tokens


def sequences(model: Path, sources: Any, samples: int, length: int, seed: int, cache: Path) -> torch.Tensor:
    """Calibration sequences (samples, length); what the model writes of them stays in the cache."""
    checkpoint = Checkpoint(model)
    text = calibration_text(
        sources,
        checkpoint,
        read_config(checkpoint),
        resolve_device(None),
        samples=samples,
        length=length,
        seed=seed,
    )
    written = "none" if text.form is None else "-".join(str(part.samples) for part in text.parts)
    memory = cache / f"{model.resolve().parent.name}-{model.name}-{written}x{length}-{seed}"
    memory.mkdir(parents=True, exist_ok=True)
    return text.tokens(memory, progress=True)


def print_results(rows: list[Record]) -> None:
    """A table for each model, method and pattern."""
    dense = {row["model"]: row["perplexity"] for row in rows if row["method"] == "dense"}
    texts = list(next(iter(dense.values())))
    shown = [
        [row["model"], "dense", "", "", "", *row["perplexity"].values(), 0.0]
        for row in rows
        if row["method"] == "dense"
    ]
    for row in rows:
        if row["method"] != "dense":
            loss = mean(math.log(row["perplexity"][text] / dense[row["model"]][text]) for text in texts)
            cells = (row[key] for key in ("model", "method", "pattern", "self", "samples"))
            shown.append([*cells, *row["perplexity"].values(), loss])
    print_table(["model", "method", "zeros", "self", "samples", *texts, "mean log ratio"], shown)


def main(
    models: tuple[Path, ...],
    given: Path,
    texts: tuple[Path, ...],
    cache: Path,
    methods: tuple[str, ...] = ("sparsegpt", "admm"),
    patterns: tuple[str, ...] = ("50%",),
    shares: tuple[float, ...] = (0.0, 0.5, 1.0),
    samples: tuple[int, ...] = (64,),
    length: int = 256,
    window: int = 512,
    windows: int = 64,
    seed: int = 0,
    results: Path = RESULTS / "calibration_text.json",
) -> None:
    """See above.

    Args:
        given: the text that is calibrated on where the model does not write all.
        cache: keeps what models write.
        shares: of self-written text.
        samples: calibration sequences; of more than one number all are measured.
        length: of a calibration sequence.
        window: tokens that perplexity is measured in.
    """
    settings = {
        "given": given.name,
        "texts": [text.name for text in texts],
        "length": length,
        "window": window,
        "windows": windows,
        "seed": seed,
    }
    about = {**environment(), **settings}
    rows = load(results, settings)
    keys = ("model", "method", "pattern", "self", "samples")
    for model in models:
        name = "demo" if model.name == "model" else model.name
        tokenizer = AutoTokenizer.from_pretrained(model)
        evaluation = {text.stem: evaluation_tokens(text, tokenizer)[: windows * window] for text in texts}
        cells = [("dense", "0%", None, None), *product(methods, patterns, shares, samples)]
        for method, pattern, share, count in cells:
            row: Record = dict(zip(keys, (name, method, pattern, share, count), strict=True))
            if any(all(row[key] == other[key] for key in keys) for other in rows):
                continue
            if method == "dense":
                row["perplexity"] = perplexities(model, evaluation, window)
            else:
                sources = {str(given): 1 - share, "self": share}
                wanted = {source: part for source, part in sources.items() if part}
                ids = sequences(model, wanted, count, length, seed, cache)
                with tempfile.TemporaryDirectory() as temporary:
                    output = Path(temporary) / "pruned"
                    report = secateurs.prune(
                        model, output=output, calibration=ids, method=method, pattern=pattern
                    )
                    row |= {"perplexity": perplexities(output, evaluation, window), "seconds": report.seconds}
            rows.append(row)
            save(results, about, rows)
            print(*row.values(), flush=True)
    print_results(rows)


if __name__ == "__main__":
    tyro.cli(main)
