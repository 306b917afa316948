"""What a sparse training step takes beside a plain one, whole and in parts, on a Llama of random weights.

Two copies of one model train in turns, one plainly and one at a constant omission rate, so that a busy
machine slows both alike; figures are medians, speed-ups medians of the paired ratios. The parts:

- blocks: forward and backward of all blocks. What their FLOPs allow is 1 / (1 - rate).
- head: embedding, final norm, logits and loss, forward and backward; never omitted.
- optimiser: clipping and AdamW's step; of the sparse model only on what runs.
- probe: measuring importance on a dense pass, every `probe_every` steps.
- gather: changing what runs: putting the kept rows first and taking the state along; as often.

    taskset -c 0 python benchmarks/sat_step_time.py
"""

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from common import RESULTS, Record, environment, print_table, save
from secateurs.training.importance import measure
from secateurs.training.ladder import Constant
from secateurs.training.sparse import SparseTraining

PROBE_EVERY = 20


class Side:
    """One of the two models, and its step in parts."""

    def __init__(self, config: LlamaConfig, rate: float, tokens: Tensor) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.tokens = tokens
        self.sparse = None
        if rate:
            self.sparse = SparseTraining(
                schedule=Constant(rate, 10**6), importance="weighted", probe_every=10**6
            )
            self.sparse.attach(self.model, self.optimizer, total_steps=10**6)
        self.hidden = torch.randn(*tokens.shape, config.hidden_size)

    def step(self) -> None:
        """A whole step, without probe and gather."""
        self.backward()
        self.optimise()

    def backward(self) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()

    def optimise(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.sparse is not None:
            self.sparse.step()

    def blocks(self) -> None:
        """All blocks, forward and backward, on a given input and towards a given gradient."""
        states = self.hidden.clone().requires_grad_()
        positions = torch.arange(states.shape[1])[None]
        rotary = self.model.model.rotary_emb(states, positions)
        output: Tensor = states
        for block in self.model.model.layers:
            output = block(output, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        output.backward(self.hidden)

    def head(self) -> None:
        """All but the blocks, forward and backward."""
        states = self.model.model.norm(self.model.model.embed_tokens(self.tokens))
        logits = self.model.lm_head(states)
        self.model.loss_function(logits, self.tokens, vocab_size=self.model.config.vocab_size).backward()

    def probe(self) -> None:
        assert self.sparse is not None
        measure(self.model, self.sparse.omission, "weighted", (), {"input_ids": self.tokens})


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(config: LlamaConfig, rate: float, tokens: Tensor, repetitions: int) -> Record:
    """Both sides of every part, in turns."""
    plain, sparse = Side(config, 0.0, tokens), Side(config, rate, tokens)
    for side in (plain, sparse):  # warm up, and choose what is omitted
        side.step()
        side.optimizer.zero_grad()
    times: dict[str, list[tuple[float, float]]] = {"step": [], "blocks": [], "head": [], "optimiser": []}
    sat = sparse.sparse
    assert sat is not None
    for _ in range(repetitions):
        times["step"].append((seconds(plain.step), seconds(sparse.step)))
        for side in (plain, sparse):
            side.optimizer.zero_grad()
        times["blocks"].append((seconds(plain.blocks), seconds(sparse.blocks)))
        times["head"].append((seconds(plain.head), seconds(sparse.head)))
        for side in (plain, sparse):
            side.optimizer.zero_grad()
            side.backward()
        times["optimiser"].append((seconds(plain.optimise), seconds(sparse.optimise)))
        for side in (plain, sparse):
            side.optimizer.zero_grad()
    probes, gathers = [], []
    for _ in range(repetitions):
        # A change of the set by hand: whole, measured, another half chosen, small again.
        undo = seconds(sat.whole)
        probes.append(seconds(sparse.probe))
        with torch.no_grad():
            for scores in sat.scores or []:
                for kind in scores:
                    scores[kind] = torch.rand_like(scores[kind])
        choose = seconds(
            lambda: (sat._choose(sat._keep(sat.rates), False), sat._use(), sat.omission.engage())
        )
        sat._ready = True
        gathers.append(undo + choose)
        sparse.step()
        sparse.optimizer.zero_grad()
    record: Record = {"rate": rate, "kept_channels": int(sat.kept[0]["mlp"].sum())}  # type: ignore[union-attr]
    for part, pairs in times.items():
        record[part] = {
            "plain_seconds": median(a for a, _ in pairs),
            "sparse_seconds": median(b for _, b in pairs),
            "speed_up": median(a / b for a, b in pairs),
        }
    record["blocks"]["allowed"] = 1 / (1 - rate)
    record["blocks"]["share_of_allowed"] = record["blocks"]["speed_up"] * (1 - rate)
    record["probe_seconds"], record["gather_seconds"] = median(probes), median(gathers)
    extra = (record["probe_seconds"] + record["gather_seconds"]) / PROBE_EVERY
    record["step"]["speed_up_with_probe_and_gather"] = record["step"]["plain_seconds"] / (
        record["step"]["plain_seconds"] / record["step"]["speed_up"] + extra
    )
    sat.detach()
    return record


def main(
    rates: tuple[float, ...] = (0.25, 0.5, 0.75),
    width: int = 768,
    blocks: int = 4,
    heads: int = 12,
    channels: int = 2048,
    vocabulary: int = 8192,
    batch_size: int = 2,
    length: int = 512,
    repetitions: int = 7,
    threads: int = 1,
    name: str = "sat_step_time",
) -> None:
    torch.set_num_threads(threads)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=channels,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
    )
    torch.manual_seed(1)
    tokens = torch.randint(vocabulary, (batch_size, length))
    about = {
        **environment(),
        "threads": threads,
        "model": {key: getattr(config, key) for key in ("hidden_size", "intermediate_size", "vocab_size")}
        | {"blocks": blocks, "heads": heads},
        "batch_size": batch_size,
        "length": length,
        "probe_every": PROBE_EVERY,
        "repetitions": repetitions,
    }
    rows = []
    for rate in rates:
        rows.append(compare(config, rate, tokens, repetitions))
        save(RESULTS / f"{name}.json", about, rows)
        gc.collect()
    parts = ("blocks", "head", "optimiser", "step")
    print_table(
        ["rate", *(f"{part}: plain, sparse (ms), speed-up" for part in parts), "blocks: of allowed",
         "probe (ms)", "gather (ms)", "step with both every 20"],
        [
            [
                row["rate"],
                *(
                    f"{1e3 * row[part]['plain_seconds']:.0f}, {1e3 * row[part]['sparse_seconds']:.0f}, "
                    f"{row[part]['speed_up']:.2f}"
                    for part in parts
                ),
                row["blocks"]["share_of_allowed"],
                1e3 * row["probe_seconds"],
                1e3 * row["gather_seconds"],
                row["step"]["speed_up_with_probe_and_gather"],
            ]
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
