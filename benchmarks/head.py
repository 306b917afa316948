"""The head and the loss of a training step: the model's own code, TRL's fused head, and ours.

Forward and backward of a Llama without blocks (embedding, norm, head, loss), random weights, float32, where
all positions have labels and where half of them do, as in fine-tuning. Processor seconds of one thread, in
turns; ratios are medians of pairs. Memory is the most that the process holds beyond what it held before.

    taskset -c 0 python benchmarks/head.py
"""

import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trl
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from common import RESULTS, Record, arguments, environment, print_table, save
from secateurs.training import head
from secateurs.training.head import logits_where_labels
from timing import in_turns, medians, speedup

SHAPES = {"SmolLM2-135M": (576, 49152), "width 768": (768, 8192)}
"""Hidden size and vocabulary."""


def held(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most since the last `forget_peak`."""
    found = re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def chunk_of(size: int) -> Any:
    before, head.CHUNK = head.CHUNK, size
    try:
        yield
    finally:
        head.CHUNK = before


def contenders(model: Any, chunks: list[int]) -> dict[str, Callable[[Any, Any], Any]]:
    """By name the loss of ids and labels. TRL's head changes nothing for those who do not call it."""

    def own(ids: Any, labels: Any) -> Any:
        return model(input_ids=ids, labels=labels, use_cache=False).loss

    def fused(ids: Any, labels: Any) -> Any:
        return model(input_ids=ids, labels=labels, fused_lm_head=True).loss

    def lean(size: int, ids: Any, labels: Any) -> Any:
        with chunk_of(size):
            return own(ids, labels)

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does
    return {"own": own, "trl": fused, **{f"lean, {size} at once": partial(lean, size) for size in chunks}}


def compare(
    hidden: int, vocabulary: int, tokens: int, share: float, chunks: list[int], rounds: int
) -> Record:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=0, max_position_embeddings=tokens
    )
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(vocabulary, (1, tokens))
    labels = ids.clone()
    labels[:, : round((1 - share) * tokens)] = -100

    def run(loss_of: Callable[[Any, Any], Any]) -> tuple[float, int, float]:
        model.zero_grad()
        before = held("VmRSS")
        forget_peak()
        start = time.process_time()
        loss = loss_of(ids, labels)
        loss.backward()
        return time.process_time() - start, held("VmHWM") - before, loss.item()

    def within(loss_of: Callable[[Any, Any], Any]) -> tuple[float, int, float]:
        with logits_where_labels(model) as does:
            assert does
            return run(loss_of)

    runs = {
        name: partial(within if name.startswith("lean") else run, loss_of)
        for name, loss_of in contenders(model, chunks).items()
    }
    results = in_turns(runs, rounds)
    times = {name: [seconds for seconds, _, _ in values] for name, values in results.items()}
    return {
        "hidden": hidden,
        "vocabulary": vocabulary,
        "labels": share,
        "contenders": {
            name: {
                "seconds": seconds,
                "speed_up_over_own": speedup(times, name, "own"),
                "bytes": median(memory for _, memory, _ in results[name]),
                "loss": results[name][0][2],
            }
            for name, seconds in medians(times).items()
        },
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--labels", type=float, nargs="*", default=[1.0, 0.5])
    parser.add_argument("--chunks", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS / "head.json")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    about = {
        **environment(),
        "trl": trl.__version__,
        "tokens": settings.tokens,
        "rounds": settings.rounds,
        "threads": 1,
    }
    rows = []
    for name, (hidden, vocabulary) in SHAPES.items():
        for share in settings.labels:
            made = compare(hidden, vocabulary, settings.tokens, share, settings.chunks, settings.rounds)
            rows.append({"shape": name, **made})
            save(settings.results, about, rows)
    print_table(
        ["shape", "labels", "", "ms", "times as fast as own", "MB", "loss"],
        [
            [
                row["shape"],
                row["labels"],
                name,
                1e3 * found["seconds"],
                found["speed_up_over_own"],
                found["bytes"] / 1e6,
                found["loss"],
            ]
            for row in rows
            for name, found in row["contenders"].items()
        ],
    )


if __name__ == "__main__":
    main()
