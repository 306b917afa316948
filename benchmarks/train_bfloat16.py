"""Training on a CPU with bfloat16 products (autocast) beside float32 ones: the loss, and the time of a step.

The bundled model on GSM8K, as in `sat_quality.py`, plain and by Sparsity-Accelerated Training; all take turns
step by step, in processor seconds of one thread. Validation is in float32. A row in the results is not
repeated.

    taskset -c 0 python benchmarks/train_bfloat16.py --data ../data/gsm8k
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import tyro

from common import RESULTS, Record, environment, load, print_table, save
from sat_quality import LEARNING_RATE, Experiment, Task, stacked, steps_of
from timing import in_turns


def in_bfloat16(run: Iterator[Record], steps: int) -> Iterator[Record]:
    """The same run with every step under autocast."""
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            made = next(run)
        yield made
    yield from run


def main(
    data: Path,
    tasks: tuple[Task, ...] = ("cpt", "sft"),
    seeds: tuple[int, ...] = (0, 1, 2),
    cells: tuple[str, ...] = ("dense", "sat"),
    steps: int = 80,
    batch_size: int = 4,
    length: int = 256,
    results: Path = RESULTS / "train_bfloat16.json",
) -> None:
    torch.set_num_threads(1)
    about = {**environment(), "batch_size": batch_size, "length": length, "learning_rate": LEARNING_RATE}
    for seed in seeds:
        for task in tasks:
            rows = load(results)
            if any((row["task"], row["seed"]) == (task, seed) for row in rows):
                continue
            experiment = Experiment(task, data, about, results, tuning=True)
            order = torch.randperm(len(experiment.train), generator=torch.Generator().manual_seed(seed))
            chosen = order[: steps * batch_size].view(steps, batch_size).tolist()
            batches = [stacked([experiment.train[i] for i in some]) for some in chosen]
            runs = {}
            for cell in cells:
                parts = (cell, task, seed, batches, experiment.held_out, batch_size)
                runs[cell, "float32"] = partial(next, steps_of(*parts))
                runs[cell, "bfloat16"] = partial(next, in_bfloat16(steps_of(*parts), steps))
            made = in_turns(runs, steps + 1, warm_up=0)
            rows += [{"products": kind, **found[-1]} for (_, kind), found in made.items()]
            save(results, about, rows)
    rows = load(results)
    plain = {(row["task"], row["cell"], row["seed"]): row for row in rows if row["products"] == "float32"}
    table = []
    for task, cell in dict.fromkeys((row["task"], row["cell"]) for row in rows):
        for kind in ("float32", "bfloat16"):
            found = [row for row in rows if (row["task"], row["cell"], row["products"]) == (task, cell, kind)]
            beside = [plain[task, cell, row["seed"]] for row in found]
            pairs = list(zip(found, beside, strict=True))
            margins = [row["validation_loss"] / other["validation_loss"] - 1 for row, other in pairs]
            table.append(
                [
                    *(task, cell, kind, len(found)),
                    mean(row["validation_loss"] for row in found),
                    f"{mean(margins):+.2%} ({min(margins):+.2%} to {max(margins):+.2%})",
                    mean(other["seconds"] / row["seconds"] for row, other in pairs),
                ]
            )
    print_table(["", "", "products", "seeds", "validation loss", "over float32", "times as fast"], table)


if __name__ == "__main__":
    tyro.cli(main)
