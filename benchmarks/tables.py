"""The embedding and the head as codes: what rounding them alone loses, and which inputs ought to count.

Only they are rounded. By row all inputs count alike, as for an embedding of which rows are read; by the head
what it is given on the calibration text counts; where both are one table, the second with a share of the
first. Perplexity, and the divergence of the dense model's predictions, on windows all over each text.

    python benchmarks/tables.py --calibration ../data/wikitext-2/valid.txt \
        --texts ../data/wikitext-2/test.txt ../data/books/Dracula_345.txt --model ../SmolLM2-135M-Instruct

Without `--model` it is the model that the package carries. A cell in the results is not repeated.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoTokenizer

from common import RESULTS, environment, load, print_table, save
from secateurs.demo import MODEL
from secateurs.pattern import Mask
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.pruning.tables import SHARED
from secateurs.runtime.load import load_model
from secateurs.text import calibration_blocks, evaluation_tokens
from secateurs.values import parse_values

NEAREST, ROWS, HEAD, BOTH = "nearest levels", "by row", "by the head", "by both"
WAYS = (NEAREST, ROWS, HEAD, BOTH)


def spread(tokens: torch.Tensor, length: int, windows: int) -> torch.Tensor:
    """(windows, length), evenly from the text's beginning to its end."""
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    return whole[torch.arange(windows) * len(whole) // windows]


@torch.no_grad()
def given_to_head(model: Any, ids: torch.Tensor) -> Statistics:
    """The second moment of it."""
    statistics = Statistics(model.get_output_embeddings().in_features)
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: statistics.update(args[0]))
    for sequence in ids:
        model(input_ids=sequence[None])
    hook.remove()
    return statistics


def predictions(model: Any, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logarithms of the probabilities, (length, vocabulary), of each window."""
    for window in ids:
        with torch.no_grad():
            yield model(input_ids=window[None]).logits[0].float().log_softmax(-1)


def scores(dense: list[torch.Tensor], model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Perplexity, and the divergence from the dense model's predictions."""
    losses, divergences = [], []
    for was, now, window in zip(dense, predictions(model, ids), ids, strict=True):
        losses.append(-now[:-1].gather(-1, window[1:, None]).mean())
        divergences.append((was.exp() * (was - now)).sum(-1).mean())
    return float(torch.stack(losses).mean().exp()), float(torch.stack(divergences).mean())


def main(
    calibration: Path,
    texts: tuple[Path, ...],
    model: Path = MODEL,
    values: tuple[str, ...] = ("int8:group=128", "int4", "int3"),
    samples: int = 16,
    length: int = 512,
    windows: int = 12,
    results: Path = RESULTS / "tables.json",
) -> None:
    about = {
        "model": model.name if model != MODEL else "bundled",
        "calibration": calibration.name,
        "texts": [text.name for text in texts],
        "samples": samples,
        "length": length,
        "windows": windows,
    }
    rows = load(results, about)
    tokenizer, held = AutoTokenizer.from_pretrained(model), load_model(model, dtype=torch.float32)
    table, head = held.get_input_embeddings().weight.data, held.get_output_embeddings().weight.data
    assert table.data_ptr() == head.data_ptr(), "this benchmark is of models whose head is the embedding"
    statistics = given_to_head(
        held, calibration_blocks(calibration, tokenizer, samples=samples, length=length)
    )
    ids = {text.stem: spread(evaluation_tokens(text, tokenizer), length, windows) for text in texts}
    dense = {name: list(predictions(held, each)) for name, each in ids.items()}
    was = table.clone()
    every = Mask(torch.ones_like(was, dtype=torch.bool))
    cells = [("", "as stored"), *product(WAYS, values)]
    for way, grid in cells:
        if any((row["by"], row["values"]) == (way, grid) for row in rows):
            continue
        if way:
            solver = Rounding(
                parse_values(grid),
                passes=0 if way == NEAREST else 2,
                damping=SHARED if way == BOTH else 0.01,
                shrinkage=0.0,
            )
            by_row = way in (NEAREST, ROWS)
            counted = Statistics.from_inputs(torch.eye(was.shape[1])) if by_row else statistics
            table.copy_(solver.solve(was, counted, every).weight)
        found = {name: scores(dense[name], held, each) for name, each in ids.items()}
        table.copy_(was)
        rows.append({"by": way, "values": grid, "scores": found})
        save(results, {**environment(), **about}, rows)
    header = ["values", "what counts", *(f"{name} {kind}" for name in ids for kind in ("perplexity", "KL"))]
    print_table(
        header,
        [[row["values"], row["by"], *(x for pair in row["scores"].values() for x in pair)] for row in rows],
    )


if __name__ == "__main__":
    tyro.cli(main)
