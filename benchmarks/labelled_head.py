"""What it saves to make logits only where there are labels, beside the model's own loss and TRL's fused head.

Forward and backward pass of a Llama with the width and vocabulary of SmolLM2-135M and few blocks, so that its
head is most of it; the last tokens of the sequence have labels. The three take turns; medians, of processor
seconds where there is one thread.

    taskset -c 0 python benchmarks/labelled_head.py
"""

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from common import RESULTS, environment, print_table, save
from secateurs.training.head import logits_where_labels
from timing import in_turns, medians


def seconds(run: Callable[[], Tensor], model: Any) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run().backward()
    taken = clock() - start
    model.zero_grad()
    return taken


def main(
    shares: tuple[float, ...] = (0.25, 0.5),
    length: int = 512,
    blocks: int = 1,
    repetitions: int = 3,
    threads: int = 1,
    results: Path = RESULTS / "labelled_head.json",
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    own = LlamaForCausalLM(config).train()
    picking, fused = copy.deepcopy(own), copy.deepcopy(own)
    add_fused_lm_head(fused, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does
    ids = torch.randint(config.vocab_size, (1, length))
    rows = []
    with logits_where_labels(picking) as does:
        assert does
        for share in shares:
            labels = ids.clone()
            labels[:, : round((1 - share) * length)] = -100
            call = {"input_ids": ids, "labels": labels}
            runs: dict[str, Callable[[], Tensor]] = {
                "own": lambda call=call: own(**call).loss,
                "where labels": lambda call=call: picking(**call).loss,
                "trl": lambda call=call: fused(**call, fused_lm_head=True).loss,
            }
            models = {"own": own, "where labels": picking, "trl": fused}
            losses = {name: float(run().detach()) for name, run in runs.items()}
            pairs = in_turns(
                {name: partial(seconds, run, models[name]) for name, run in runs.items()}, repetitions
            )
            rows.append({"share": share, "seconds": medians(pairs), "loss": losses})
            save(results, environment() | {"length": length, "blocks": blocks, "threads": threads}, rows)
    print_table(
        ["labels", *(f"{name}: s, of own" for name in rows[0]["seconds"])],  # type: ignore[attr-defined]
        [
            [row["share"], *(f"{s:.2f}, {s / row['seconds']['own']:.2f}" for s in row["seconds"].values())]  # type: ignore[attr-defined,index]
            for row in rows
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
