"""A training step on conversations of all lengths, with the padding of its batch and without, by batch size.

SmolLM2-135M-Instruct on GSM8K in its own chat template, sequences drawn at random as a Trainer draws them;
products in bfloat16, logits where there are labels, AdamW. Both take a step on every batch, in turns, in
processor seconds of one thread; how far their losses are apart.

    taskset -c 0 python benchmarks/padding.py --cache ../cache --gsm8k ../data/gsm8k
"""

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM

from common import RESULTS, Record, environment, print_table, save
from published import published_model
from sat_published import answer_batches
from sat_quality import Batch, stacked
from secateurs.checkpoint import resolve
from secateurs.text import load_tokenizer
from secateurs.training.head import logits_where_labels
from secateurs.training.padding import without_padding
from timing import in_turns


def step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch, *, padded: bool) -> tuple[float, float]:
    """Processor seconds of one, and its loss."""
    with nullcontext() if padded else without_padding(model), logits_where_labels(model):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start, loss.item()


def main(
    cache: Path,
    gsm8k: Path,
    name: str = "SmolLM2-135M-Instruct",
    sizes: tuple[int, ...] = (2, 4, 8, 16),
    batches: int = 4,
    length: int = 1024,
    results: Path = RESULTS / "padding.json",
) -> None:
    """See above.

    Args:
        cache: keeps what pip brings.
        gsm8k: a folder with its train.jsonl.
        sizes: sequences in a batch.
        batches: of each size.
        length: tokens to which sequences are cut.
    """
    torch.set_num_threads(1)
    about = {**environment(), "model": name, "length": length}
    folder = Path(resolve(published_model(name, cache)))
    examples = answer_batches(gsm8k / "train.jsonl", load_tokenizer(folder), length)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # so that both are given the same weights
    rows: list[Record] = []
    table = []
    for size in sizes:
        drawn = [examples[number] for number in order[: size * batches]]
        spent = {"padded": 0.0, "without": 0.0}
        apart = places = 0.0
        for start in range(0, len(drawn), size):
            batch = stacked(drawn[start : start + size])
            places += batch["input_ids"].numel()
            ways = {"padded": True, "without": False}
            runs = {
                way: partial(step, model, optimizer, batch, padded=padded) for way, padded in ways.items()
            }
            found = in_turns(runs, 1, warm_up=not start)
            for way, [(seconds, _)] in found.items():
                spent[way] += seconds
            (_, one), (_, other) = found["padded"][0], found["without"][0]
            apart = max(apart, abs(one - other) / one)
        tokens = sum(len(example["input_ids"]) for example in drawn)
        rows.append(
            {"size": size, "places": places, "tokens": tokens, "seconds": spent, "losses_apart": apart}
        )
        save(results, about, rows)
        ratio = spent["padded"] / spent["without"]
        table.append(
            [size, places / tokens, spent["padded"] / batches, spent["without"] / batches, ratio, apart]
        )
    columns = ["sequences", "places a token", "padded, s", "without, s", "times as fast", "losses apart"]
    print_table(columns, table)


if __name__ == "__main__":
    tyro.cli(main)
