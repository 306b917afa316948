"""A training step that only reads what stands before the answers, beside a plain one, by how long that is.

SmolLM2-135M-Instruct on text, of which the end of each sequence counts as the answer; products in bfloat16,
logits where there are labels, AdamW. Both take turns, in processor seconds of one thread.

    taskset -c 0 python benchmarks/context.py --cache ../cache --text ../data/wikitext-2/test.txt
"""

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM

from common import RESULTS, Record, environment, print_table, save
from published import published_model
from secateurs.checkpoint import resolve
from secateurs.text import evaluation_tokens, load_tokenizer
from secateurs.training.context import context_read_only
from secateurs.training.head import logits_where_labels
from timing import in_turns, speedup


def timed_step(model: Any, optimizer: torch.optim.Optimizer, **batch: Any) -> tuple[float, float]:
    """Processor seconds of one, products in bfloat16, and its loss."""
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start, loss.item()


def step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor, *, reads: bool) -> float:
    with logits_where_labels(model), context_read_only(model) if reads else nullcontext():
        return timed_step(model, optimizer, input_ids=ids, labels=labels)[0]


def main(
    cache: Path,
    text: Path,
    name: str = "SmolLM2-135M-Instruct",
    shares: tuple[float, ...] = (0.5, 0.75, 0.9),
    sequences: int = 2,
    length: int = 1024,
    rounds: int = 3,
    results: Path = RESULTS / "context.json",
) -> None:
    """See above.

    Args:
        cache: keeps what pip brings.
        shares: of a sequence before its answer.
    """
    torch.set_num_threads(1)
    about = {**environment(), "model": name, "sequences": sequences, "length": length}
    folder = Path(resolve(published_model(name, cache)))
    ids = evaluation_tokens(text, load_tokenizer(folder))[: sequences * length].view(sequences, length)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    rows: list[Record] = []
    table = []
    for share in shares:
        labels = ids.clone()
        labels[:, : round(share * length)] = -100
        ways = {"plain": False, "read": True}
        runs = {way: partial(step, model, optimizer, ids, labels, reads=reads) for way, reads in ways.items()}
        seconds = in_turns(runs, rounds)
        rows.append({"share": share, "seconds": seconds})
        save(results, about, rows)
        medians = [median(found) for found in seconds.values()]
        table.append([f"{share:.0%}", *medians, speedup(seconds, "read", "plain")])
    print_table(["before the answer", "plain, s", "only read, s", "times as fast"], table)


if __name__ == "__main__":
    tyro.cli(main)
