"""Text that a model writes itself: how fast, and beside it transformers' own sampling.

The same number of sequences from the same first token, in batches, on one thread, by processor seconds, in
turns.

    taskset -c 0 python benchmarks/self_written.py --model .../SmolLM2-135M-Instruct
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import RESULTS, Record, environment, print_table, save
from secateurs.calibration.written import form_of, write
from secateurs.demo import MODEL
from timing import in_turns, medians, speedup


def sampled(model: Any, opening: int, sequences: int, length: int) -> torch.Tensor:
    """By transformers, from the model's whole distribution."""
    ids = torch.full((sequences, 1), opening)
    whole = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        pad_token_id=0,
    )
    tokens: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=whole)
    return tokens


def processor_seconds(run: Callable[[], torch.Tensor], shape: tuple[int, int]) -> float:
    start = time.process_time()
    assert run().shape == shape
    return time.process_time() - start


def main(
    model: Path = MODEL,
    sequences: int = 32,
    lengths: tuple[int, ...] = (128, 512),
    rounds: int = 3,
    results: Path = RESULTS / "self_written.json",
) -> None:
    """See above.

    Args:
        sequences: at once.
        lengths: of them.
    """
    about = {**environment(), "sequences": sequences}
    torch.set_num_threads(1)
    writer: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    form = form_of(AutoTokenizer.from_pretrained(model), writer.config)
    assert form.opening is not None
    rows: list[Record] = []
    table = []
    for length in lengths:
        ways = {
            "transformers": partial(sampled, writer, form.opening, sequences, length),
            "ours": partial(write, writer, form, [False] * sequences, length=length, seed=0),
        }
        seconds = in_turns(
            {way: partial(processor_seconds, run, (sequences, length)) for way, run in ways.items()},
            rounds,
            warm_up=0,
        )
        rows.append({"model": model.name, "length": length, "seconds": seconds})
        save(results, about, rows)
        paces = {way: sequences * length / median for way, median in medians(seconds).items()}
        faster = speedup(seconds, "ours", "transformers")
        table.append([length, paces["transformers"], paces["ours"], faster])
    print_table(["length", "transformers: tokens/s", "ours: tokens/s", "times as fast"], table)


if __name__ == "__main__":
    tyro.cli(main)
