"""Sparsity-Accelerated Training against plain training: loss at equal tokens, at equal time, an ablation.

Continual pre-training of the bundled model, which saw novels only, on GSM8K's questions and answers as text
(`cpt`), and supervised fine-tuning on its answers (`sft`); the loss on its test split. `dense` and `sat`
train in turns, step by step in one process; times are processor seconds of its one thread. Both make logits
only where there are labels. `dense, same time` is plain training for as many steps as `sat` leaves time for,
with a learning rate schedule of its own. With --contender auto all that is of `auto`, which spends as many
multiplications by measured rates; of `whole, context` nothing is omitted but the questions' backward pass.
The others change one thing in `sat`. A row in the results is not repeated:
interrupt at will, and run the same command again. With --tuning the loss is that on the end of the training
split, on which the settings below were chosen.

    taskset -c 0 python benchmarks/sat_quality.py --data ../data/gsm8k
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from common import RESULTS, Record, environment, load, print_table, save
from secateurs.demo import MODEL
from secateurs.text import load_tokenizer
from secateurs.training.context import context_read_only
from secateurs.training.data import CHAT_TEMPLATE
from secateurs.training.head import logits_where_labels
from secateurs.training.ladder import Ladder
from secateurs.training.loop import merge, with_adapters
from secateurs.training.rates import described
from secateurs.training.sparse import SparseTraining
from timing import in_turns

CONTEXT = ", context"
Task = Literal["cpt", "sft"]
Batch = dict[str, Tensor]

LEARNING_RATE = {"cpt": 4e-3, "sft": 4e-3}  # of the bundled model, the best for plain training
HELD_OUT = {"cpt": 192, "sft": 256}  # sequences of the test split, or of the training split's end


def settings(cell: str, steps: int, seed: int) -> Record | None:
    """Arguments of SparseTraining; None for plain training.

    A cell may be followed by the shape of its ladder, "auto/0.7/0.5/0.8": its peak, the share of its steps
    that hold it, and where it ends. Last may come ", context": contexts are only read.
    """
    cell, *shape = cell.removesuffix(CONTEXT).split("/")
    peak, hold, end = map(float, shape or ("0.5", "0.5", "0.8"))
    # Its end, a fifth of the steps before training's, makes the dense last phase long enough to settle.
    ladder = Ladder(peak, round(end * steps), hold=hold, rungs=4)
    sat: Record = {"schedule": ladder, "importance": "weighted", "seed": seed}
    return {
        "dense": None,
        "dense, same time": None,
        "whole": {"rate": 0.0, "importance": "uniform"},  # to count operations
        "sat": sat,
        "auto": {**sat, "rate": "auto"},
        "activation": {**sat, "importance": "activation"},
        "uniform": {**sat, "importance": "uniform"},
        "sample": {**sat, "select": "sample"},
        "constant": {**sat, "rate": 0.5, "schedule": "constant"},
        "attention only": {**sat, "mlp_rate": 0.0},
        "mlp only": {**sat, "attention_rate": 0.0},
    }[cell]


ABLATION = ("uniform", "sample", "constant", "attention only", "mlp only")


def text_batches(rows: list[Record], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Batch]:
    """Questions and answers one after another, in blocks of `length` tokens."""
    ids: list[int] = []
    for row in rows:
        ids += tokenizer(f"{row['question']}\n{row['answer']}", verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": block, "labels": block} for block in blocks]


def chat_batches(rows: list[Record], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Batch]:
    """Each question with its answer, of which only the answer has labels."""
    examples = []
    for row in rows:
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        made: Any = tokenizer.apply_chat_template(
            messages, chat_template=CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(made["input_ids"])[:length]
        answer = torch.tensor(made["assistant_masks"])[:length].bool()
        examples.append({"input_ids": ids, "labels": ids.where(answer, -100)})
    return [example for example in examples if (example["labels"] >= 0).any()]


def stacked(examples: list[Batch]) -> Batch:
    """One batch, padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([example["input_ids"] for example in examples], batch_first=True)
    labels = pad([example["labels"] for example in examples], batch_first=True, padding_value=-100)
    ones = pad([torch.ones_like(example["input_ids"]) for example in examples], batch_first=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": ones}


@torch.no_grad()
def loss_on(model: Any, examples: list[Batch], batch_size: int) -> float:
    """Mean loss of a token."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = stacked(examples[start : start + batch_size])
        labels = int((batch["labels"][:, 1:] >= 0).sum())
        total += model(**batch).loss.item() * labels
        count += labels
    return total / count


@dataclass(frozen=True)
class Trainee:
    """A model to train."""

    folder: Path
    learning_rate: float
    bfloat16: bool = False
    """Products in bfloat16 by autocast."""
    lora: int | None = None
    """A rank: adapters are trained, then merged."""

    def load(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        model.config.use_cache = False
        return with_adapters(model, self.lora) if self.lora else model


def steps_of(
    trainee: Trainee,
    cell: str,
    seed: int,
    batches: list[Batch],
    measure: Callable[[Any], Record],
) -> Iterator[Record]:
    """Train, a step at a time: yields after each, and a row at the end, with what `measure` finds."""
    steps = len(batches)
    torch.manual_seed(seed)
    model = trainee.load()
    model.train()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=trainee.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    warmup = get_linear_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    arguments = settings(cell, steps, seed)
    sparse = None
    if arguments is not None:
        sparse = SparseTraining(**arguments)
        sparse.attach(model, optimizer, total_steps=steps)
    seconds, losses = [], []
    reading = context_read_only(model) if cell.endswith(CONTEXT) else nullcontext()
    with logits_where_labels(model), reading:
        for batch in batches:
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=trainee.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if sparse is not None:
                sparse.step()
            warmup.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.process_time() - start)
            yield {}
    if sparse is not None:
        sparse.detach()
    del optimizer
    yield {
        "cell": cell,
        "seed": seed,
        "steps": steps,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "train_loss": mean(losses[-steps // 10 :]),
        "seconds": sum(seconds),
        "rates": described(sparse.peaks or []) if sparse else None,
        "flops_of_dense": sparse.flops_done / sparse.flops_dense if sparse else 1.0,
        "step_seconds": [round(value, 4) for value in seconds],
        **measure(merge(model) if trainee.lora else model),
    }


def print_tables(rows: list[Record]) -> None:
    """One for each task: means over seeds, and margins over `dense`, least to most."""
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        dense = {row["seed"]: row["validation_loss"] for row in own if row["cell"] == "dense"}
        table = []
        for cell in dict.fromkeys(row["cell"] for row in own):
            found = [row for row in own if row["cell"] == cell]
            pairs = [(row["validation_loss"], dense[row["seed"]]) for row in found if row["seed"] in dense]
            margins = [loss / plain - 1 for loss, plain in pairs]
            table.append(
                [
                    cell,
                    len(found),
                    mean(row["steps"] for row in found),
                    mean(row["flops_of_dense"] for row in found),
                    mean(row["validation_loss"] for row in found),
                    f"{mean(margins):+.2%} ({min(margins):+.2%} to {max(margins):+.2%})" if margins else "",
                    mean(row["train_loss"] for row in found),
                ]
            )
        print(f"\n{task}\n")
        print_table(
            ["", "seeds", "steps", "FLOPs of dense", "validation loss", "over dense", "train loss"], table
        )


class Experiment:
    """The runs of one task: each is made once, and its rows saved."""

    def __init__(
        self,
        task: str,
        trainee: Trainee,
        examples: tuple[list[Batch], list[Batch]],
        about: Record,
        results: Path,
        measure: Callable[[Any, Record], Record] = lambda model, run: {},
    ) -> None:
        """Of examples to train on and held out ones; `measure` finds what else to say of a run's model."""
        self.task, self.trainee, self.about, self.results = task, trainee, about, results
        self.train, self.held_out = examples
        self.batch_size: int = about["batch_size"]
        self._measure = measure

    def batches(self, seed: int, steps: int) -> list[Batch]:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        size = self.batch_size
        return [
            stacked([self.train[i] for i in order[step * size : (step + 1) * size]]) for step in range(steps)
        ]

    def run(self, cell: str, seed: int, batches: list[Batch]) -> Iterator[Record]:
        """One to train step by step, whose last part is its row."""
        about = {"task": self.task, "cell": cell, "seed": seed}

        def measure(model: Any) -> Record:
            loss = loss_on(model, self.held_out, self.batch_size)
            return {"validation_loss": loss, **self._measure(model, about)}

        for made in steps_of(self.trainee, cell, seed, batches, measure):
            yield {**about, **made} if made else made

    def rows(self, cells: list[str], seed: int, steps: int) -> list[Record]:
        """Train these in turns, unless it was done before."""
        rows = load(self.results)
        found = {row["cell"]: row for row in rows if (row["task"], row["seed"]) == (self.task, seed)}
        if not all(cell in found for cell in cells):
            batches = self.batches(seed, steps)
            runs = {cell: partial(next, self.run(cell, seed, batches)) for cell in cells}
            found = {cell: made[-1] for cell, made in in_turns(runs, steps + 1, warm_up=0).items()}
            save(self.results, self.about, load(self.results) + list(found.values()))
            for row in found.values():
                print(
                    *(value for key, value in row.items() if key not in ("step_seconds", "rates")), flush=True
                )
        return [found[cell] for cell in cells]


def gsm8k(task: Task, data: Path, length: int, tuning: bool) -> tuple[list[Batch], list[Batch]]:
    """To train the bundled model on, and held out."""
    tokenizer = load_tokenizer(MODEL)
    make = text_batches if task == "cpt" else chat_batches
    train, test = (
        make(
            [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()],
            tokenizer,
            length,
        )
        for split in ("train", "test")
    )
    train, end = train[: -HELD_OUT[task]], train[-HELD_OUT[task] :]
    return train, end if tuning else test[: HELD_OUT[task]]


def bundled(
    task: Task,
    data: Path,
    about: Record,
    results: Path,
    *,
    tuning: bool,
    bfloat16: bool = False,
) -> Experiment:
    """The bundled model on one of its tasks."""
    trainee = Trainee(MODEL, LEARNING_RATE[task], bfloat16=bfloat16)
    return Experiment(task, trainee, gsm8k(task, data, about["length"], tuning), about, results)


def main(
    data: Path,
    tasks: tuple[Task, ...] = ("cpt", "sft"),
    seeds: tuple[int, ...] = (0, 1, 2),
    contender: Literal["sat", "auto", "whole, context", "auto, context"] = "sat",
    ablation: tuple[str, ...] = ABLATION,
    ablation_seeds: tuple[int, ...] = (0,),
    ablation_tasks: tuple[Task, ...] = ("cpt",),
    steps: int = 80,
    batch_size: int = 8,
    length: int = 256,
    tuning: bool = False,
    results: Path = RESULTS / "sat_quality.json",
) -> None:
    torch.set_num_threads(1)
    about = {**environment(), "batch_size": batch_size, "length": length, "learning_rate": LEARNING_RATE}
    experiments = {task: bundled(task, data, about, results, tuning=tuning) for task in tasks}
    for seed in seeds:
        for experiment in experiments.values():
            dense, sat = experiment.rows(["dense", contender], seed, steps)
            experiment.rows(["dense, same time"], seed, round(steps * sat["seconds"] / dense["seconds"]))
    for seed in ablation_seeds:
        for cell in ablation:
            for task in ablation_tasks:
                experiments[task].rows([cell], seed, steps)
    print_tables(load(results))


if __name__ == "__main__":
    tyro.cli(main)
