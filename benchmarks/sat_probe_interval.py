"""How long a measurement of importance stays good, and of how few tokens: what `probe_every` and
`PROBE_TOKENS` rest on.

Plain continual pre-training of the bundled model on GSM8K's text, measured densely after every step. What a
set chosen some steps ago (of averaged scores, as training does, of some tokens of each batch) still keeps of
the importance on the whole batch that the best set of now keeps, 1 if nothing is lost. The worst block
counts; each row is a mean over many steps.

    taskset -c 0 python benchmarks/sat_probe_interval.py --data ../data/gsm8k
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM

from common import RESULTS, environment, print_table, save
from secateurs.demo import MODEL
from secateurs.text import load_tokenizer
from secateurs.training import importance as importances
from secateurs.training.importance import Importance, Scores, measure
from secateurs.training.omission import Omission
from secateurs.training.sparse import SMOOTHING
from secateurs.training.units import KINDS, Kind

LAGS = (1, 5, 10, 20, 40, 80)


def kept_importance(then: Tensor, now: Tensor) -> float:
    """Of the half (per group) that scored best then, its importance now relative to the best half of now."""
    keep = then.shape[1] // 2
    stale = now.gather(1, then.topk(keep, dim=1).indices).sum()
    return float(stale / now.topk(keep, dim=1).values.sum())


def averaged(history: list[Scores], step: int, every: int) -> Scores:
    """What training would hold at `step`, had it measured every `every` steps until then."""
    scores = history[step % every]
    for index in range(step % every + every, step + 1, every):
        scores = [
            {kind: torch.lerp(old[kind], new[kind], 1 - SMOOTHING) for kind in KINDS}
            for old, new in zip(scores, history[index], strict=True)
        ]
    return scores


def main(
    data: Path,
    steps: int = 120,
    batch_size: int = 8,
    length: int = 128,
    learning_rate: float = 4e-3,
    importance: Importance = "weighted",
    tokens: tuple[int, ...] = (1024, 512, 256, 128),
    lags: tuple[int, ...] = LAGS,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
    tokenizer = load_tokenizer(MODEL)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    text = "\n".join(f"{row['question']}\n{row['answer']}" for row in rows[: steps * batch_size])
    ids: Any = tokenizer(text, return_tensors="pt")["input_ids"]
    batches = ids[0, : steps * batch_size * length].view(steps, batch_size, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    omission = Omission(model, in_place=True)
    whole = batch_size * length
    history: dict[int, list[Scores]] = {count: [] for count in (whole, *tokens)}
    for batch in batches:
        for count, scores in history.items():
            importances.PROBE_TOKENS = count
            scores.append(measure(model, omission, importance, (), {"input_ids": batch}))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def worst(kind: Kind, count: int, lag: int, step: int) -> float:
        held, now = averaged(history[count], step - lag, max(lag, 1)), history[whole][step]
        return min(kept_importance(held[b][kind], now[b][kind]) for b in range(len(held)))

    moments = range(max(lags), steps)
    records = [
        {
            "tokens": count,
            "lag": lag,
            **{kind: mean(worst(kind, count, lag, step) for step in moments) for kind in KINDS},
        }
        for count in tokens
        for lag in lags
    ]
    about = environment() | {
        "steps": steps,
        "tokens_per_batch": batch_size * length,
        "importance": importance,
    }
    save(RESULTS / "sat_probe_interval.json", about, records)
    print_table(
        ["tokens measured", "steps ago", *KINDS],
        [[r["tokens"], r["lag"], *(r[kind] for kind in KINDS)] for r in records],
    )


if __name__ == "__main__":
    tyro.cli(main)
