"""Pruning that adapts during training, against pruning before it and after it, at equal tokens.

The bundled model, which saw other novels only, is trained on a novel and on GSM8K (questions and answers as
text), in as many steps each way:

- dense: without pruning;
- METHOD, then training: pruned on the task's own text by one of prune's methods, then trained with the zeros
  held;
- training, then METHOD: the trained dense model, pruned on the same text;
- adaptive: `AdaptivePruning` with its defaults. Others change one thing in it.

The loss is that on text of the task that was held out: the end of the novel, GSM8K's test split (with
--tuning the end of its training split, on which the defaults were chosen). A row in the results is not
repeated: interrupt at will, and run the same command again.

    taskset -c 0 python benchmarks/adaptive.py --data ../data
"""

import json
import math
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

import secateurs
from common import RESULTS, Record, environment, load, print_table, save
from secateurs.demo import MODEL
from secateurs.text import load_tokenizer
from secateurs.training.adaptive import AdaptivePruning, shares_of
from secateurs.training.masks import Masks

Task = Literal["gsm8k", "novel"]
NOVEL = "books/Dracula_345.txt"
HELD_OUT = 96
"""Blocks of the task's text."""

VARIANTS: dict[str, Record] = {
    "adaptive": {},
    "adaptive, uniform": {"across_layers": False},
    "adaptive, grow 0.1": {"grow": 0.1},
    "adaptive, grow 0.3": {"grow": 0.3},
    "adaptive, linear": {"schedule": "linear"},
    "adaptive, end 0.4": {"end": 0.4},
    "adaptive, end 0.5": {"end": 0.5},
    "adaptive, end 0.75": {"end": 0.75},
    "adaptive, every 0.05": {"every": 0.05},
}
CELLS = (
    *("dense", "sparsegpt, then training", "sparsellm, then training"),
    *("training, then sparsegpt", "training, then sparsellm", "adaptive"),
)


def blocks_of(task: Task, data: Path, length: int, tuning: bool) -> tuple[Tensor, Tensor]:
    """(blocks, length) ids to train on, and others to measure on."""
    tokenizer = load_tokenizer(MODEL)

    def packed(texts: list[str]) -> Tensor:
        ids: list[int] = []
        for text in texts:
            ids += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    if task == "novel":
        blocks = packed([(data / NOVEL).read_text(encoding="utf-8")])
    else:
        train, test = (
            packed(
                [
                    f"{row['question']}\n{row['answer']}"
                    for row in map(json.loads, (data / "gsm8k" / f"{split}.jsonl").read_text().splitlines())
                ]
            )
            for split in ("train", "test")
        )
        blocks = train if tuning else torch.cat([train, test[:HELD_OUT]])
    return blocks[:-HELD_OUT], blocks[-HELD_OUT:]


@torch.no_grad()
def loss_on(model: Any, blocks: Tensor) -> float:
    """Mean over the blocks."""
    model.eval()
    return mean(model(input_ids=ids, labels=ids).loss.item() for ids in blocks.split(8))


def trained(
    folder: Path, batches: list[Tensor], learning_rate: float, pruning: AdaptivePruning | None
) -> tuple[Any, Record]:
    """A model's folder, trained with its zeros held or while it is pruned; and what that took."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    steps = len(batches)
    made = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    rate = get_cosine_schedule_with_warmup(made, round(0.05 * steps), steps)
    if pruning is not None:
        pruning.attach(model, made, total_steps=steps)
    else:
        Masks.of_zeros(model).attach(made)
    losses, updates = [], 0.0
    start = time.perf_counter()
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        made.step()
        before = time.perf_counter()
        if pruning is not None:
            pruning.step()
        updates += time.perf_counter() - before
        rate.step()
        made.zero_grad()
        losses.append(loss.item())
    seconds = {"seconds": time.perf_counter() - start, "update_seconds": updates}
    return model, {**seconds, "train_loss": mean(losses[-steps // 10 :])}


class Experiment:
    """The runs of one task and pattern."""

    def __init__(self, place: Path, train: Tensor, held_out: Tensor, settings: Record) -> None:
        self.place, self.train, self.held_out, self.settings = place, train, held_out, settings

    def row(self, cell: str, pattern: str, seed: int) -> Record:
        """Make one cell."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        order = order.repeat(math.ceil(self.settings["steps"] * self.settings["batch_size"] / len(order)))
        size = self.settings["batch_size"]
        batches = list(self.train[order].split(size)[: self.settings["steps"]])
        rate = self.settings["learning_rate"]
        found: Record = {}
        if cell in VARIANTS:
            pruning = AdaptivePruning(pattern, **VARIANTS[cell])
            model, found = trained(MODEL, batches, rate, pruning)
            shares = shares_of(model)
            found["sparsity"] = pruning.sparsity
            found["least_and_most"] = [min(shares.values()), max(shares.values())]
        elif cell.endswith("then training"):
            output = self.pruned(MODEL, cell.partition(",")[0], pattern, seed, order)
            model, found = trained(output, batches, rate, None)
        else:
            dense = self.place / f"dense-{seed}"
            if not dense.exists():
                model, found = trained(MODEL, batches, rate, None)
                model.save_pretrained(dense)
                AutoTokenizer.from_pretrained(MODEL).save_pretrained(dense)
            if cell != "dense":
                dense = self.pruned(dense, cell.rpartition(" ")[2], pattern, seed, order)
            model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        return {"cell": cell, "seed": seed, "loss": loss_on(model, self.held_out), **found}

    def pruned(self, model: Path, method: str, pattern: str, seed: int, order: Tensor) -> Path:
        """A pruned folder."""
        output = self.place / f"{model.name}-{method}-{pattern.replace(':', '-')}-{seed}"
        if not output.exists():
            secateurs.prune(
                model,
                output=output,
                calibration=self.train[order[: self.settings["calibration_blocks"]]],
                pattern=pattern,
                method=method,
                device="cpu",
            )
        return output


def main(
    data: Path,
    tasks: tuple[Task, ...] = ("gsm8k", "novel"),
    patterns: tuple[str, ...] = ("70%", "2:4"),
    cells: tuple[str, ...] = CELLS,
    seeds: tuple[int, ...] = (0,),
    steps: int = 96,
    batch_size: int = 4,
    length: int = 256,
    learning_rate: float = 4e-3,
    calibration_blocks: int = 64,
    tuning: bool = False,
    results: Path = RESULTS / "adaptive.json",
) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    settings: Record = {
        "steps": steps,
        "batch_size": batch_size,
        "length": length,
        "learning_rate": learning_rate,
        "calibration_blocks": calibration_blocks,
        "tuning": tuning,
    }
    rows = load(results, settings)
    about = {**environment(), **settings}
    for seed in seeds:
        for task in tasks:
            with tempfile.TemporaryDirectory() as place:
                experiment = Experiment(Path(place), *blocks_of(task, data, length, tuning), settings)
                for pattern in patterns:
                    for cell in cells:
                        what = {"task": task, "pattern": "" if cell == "dense" else pattern}
                        if any(
                            {**row, **what} == row and (row["cell"], row["seed"]) == (cell, seed)
                            for row in rows
                        ):
                            continue
                        rows.append({**what, **experiment.row(cell, pattern, seed)})
                        save(results, about, rows)
                        print(rows[-1], flush=True)
    kinds = dict.fromkeys((row["task"], row["pattern"], row["cell"]) for row in rows)
    table = []
    for kind in kinds:
        losses = [row["loss"] for row in rows if (row["task"], row["pattern"], row["cell"]) == kind]
        table.append([*kind, len(losses), mean(losses), math.exp(mean(losses))])
    print_table(["task", "pattern", "", "seeds", "loss", "perplexity"], table)


if __name__ == "__main__":
    tyro.cli(main)
