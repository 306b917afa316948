"""A training step on conversations of all lengths, with the padding of its batch and without, and TRL's.

SmolLM2-135M-Instruct on GSM8K in its own chat template, sequences drawn at random as a Trainer draws them;
products in bfloat16, AdamW. All take a step on every batch, in turns, in processor seconds of one thread; how
far losses are apart. Ours make logits where there are labels; TRL's way is the padded batch with the head of
its SFTTrainer, without what else a trainer does.

    taskset -c 0 python benchmarks/padding.py --cache ../cache --gsm8k ../data/gsm8k
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from common import RESULTS, Record, environment, print_table, save
from context import timed_step
from published import published_model
from sat_published import answer_batches
from sat_quality import Batch, stacked
from secateurs.checkpoint import resolve
from secateurs.text import load_tokenizer
from secateurs.training.head import logits_where_labels
from secateurs.training.padding import without_padding
from timing import in_turns


@contextmanager
def padded(model: Any) -> Iterator[dict[str, Any]]:
    with logits_where_labels(model):
        yield {}


@contextmanager
def unpadded(model: Any) -> Iterator[dict[str, Any]]:
    with without_padding(model), logits_where_labels(model):
        yield {}


@contextmanager
def as_trl_does(model: Any) -> Iterator[dict[str, Any]]:
    yield {"fused_lm_head": True}


WAYS = {"TRL": as_trl_does, "padded": padded, "without": unpadded}


def step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    way: Callable[[Any], AbstractContextManager[dict[str, Any]]],
) -> tuple[float, float]:
    """Processor seconds of one, and its loss."""
    with way(model) as more:
        return timed_step(model, optimizer, **batch, **more)


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
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # for those who ask for it
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # so that all are given the same weights
    rows: list[Record] = []
    table = []
    for size in sizes:
        drawn = [examples[number] for number in order[: size * batches]]
        spent = dict.fromkeys(WAYS, 0.0)
        apart = places = 0.0
        for start in range(0, len(drawn), size):
            batch = stacked(drawn[start : start + size])
            places += batch["input_ids"].numel()
            runs = {name: partial(step, model, optimizer, batch, way) for name, way in WAYS.items()}
            found = in_turns(runs, 1, warm_up=not start)
            for name, [(seconds, _)] in found.items():
                spent[name] += seconds
            losses = [loss for [(_, loss)] in found.values()]
            apart = max(apart, max(losses) / min(losses) - 1)
        tokens = sum(len(example["input_ids"]) for example in drawn)
        rows.append(
            {"size": size, "places": places, "tokens": tokens, "seconds": spent, "losses_apart": apart}
        )
        save(results, about, rows)
        times = [spent[name] / spent["without"] for name in ("TRL", "padded")]
        table.append([size, places / tokens, *(spent[name] / batches for name in WAYS), *times, apart])
    columns = ["sequences", "places a token", "TRL, s", "padded, s", "without, s"]
    print_table([*columns, "times TRL's speed", "times padded", "losses apart"], table)


if __name__ == "__main__":
    tyro.cli(main)
