"""Sparsity-Accelerated Training of a published model: loss, what it forgets, right answers, time, memory.

Continual pre-training (`cpt`) of SmolLM2-135M-Instruct on novels, its loss on a novel of the same author that
it was not trained on; and fine-tuning (`sft`) on GSM8K's answers in its own chat template, its loss on the
test split. Plain and sparse training take turns, step by step in one process, in processor seconds of one
thread; all make logits only where there are labels, and multiply in bfloat16 by autocast, which is the faster
here, unless told otherwise. With each model, and with the one that they begin from: perplexity of a text of
another kind, zero-shot accuracy, and with `--answers` how many answers to GSM8K's test questions are right,
decoded greedily.

`--tuning` measures the loss on the end of the training data instead, and nothing else: learning rates, the
best for plain training, and ladders were chosen so. A row in the results is not repeated: interrupt at will,
and run the same command again. `--memory` measures the peak memory of each cell instead, in processes of
their own.

    taskset -c 0 python benchmarks/sat_published.py --cache ../cache --gsm8k ../data/gsm8k --tasks sft \
        --text ../data/wikitext-2/test.txt --questions ../data/tasks ../data/piqa --answers 300
"""

import json
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import tyro
from transformers import PreTrainedTokenizerBase

import secateurs
from common import RESULTS, Record, environment, load, print_table, save
from job import peak_bytes
from published import published_model, write_questions
from real import accuracy, spread
from sat_quality import Batch, Experiment, Trainee, loss_on, steps_of
from secateurs.checkpoint import resolve
from secateurs.text import evaluation_tokens, load_tokenizer

Task = Literal["cpt", "sft"]

LEARNING_RATE: dict[Task, float] = {"cpt": 3e-4, "sft": 1e-4}
"""Of full training, the best of three for plain training over 40 steps."""

HELD_OUT = {"cpt": 64, "sft": 128}
"""Sequences to measure the loss on."""

MEMORY_STEPS = 5
"""From the peak of the ladder to its dense end."""


def novel_batches(files: tuple[Path, ...], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Batch]:
    """Texts one after another, in blocks of `length` tokens."""
    ids = torch.cat([evaluation_tokens(file, tokenizer) for file in files])
    return [
        {"input_ids": block, "labels": block} for block in ids[: len(ids) // length * length].view(-1, length)
    ]


def answer_batches(file: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Batch]:
    """Questions with their answers in the model's own chat template; only answers have labels."""
    examples = []
    for row in map(json.loads, file.read_text().splitlines()):
        messages = [{"role": "user", "content": row["question"]}]
        answer = [{"role": "assistant", "content": row["answer"]}]
        prompt = chat_ids(tokenizer, messages, add_generation_prompt=True)
        ids = torch.tensor(chat_ids(tokenizer, messages + answer)[:length])
        labels = ids.where(torch.arange(len(ids)) >= len(prompt), -100)
        if len(prompt) < len(ids):
            examples.append({"input_ids": ids, "labels": labels})
    return examples


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Record], **settings: bool) -> list[int]:
    made: Any = tokenizer.apply_chat_template(messages, return_dict=True, **settings)
    return list(made["input_ids"])


@torch.inference_mode()
def right_answers(model: Any, tokenizer: PreTrainedTokenizerBase, file: Path, count: int) -> float:
    """Share of the first questions whose greedy answer ends in the right number."""
    rows = [json.loads(line) for line in file.read_text().splitlines()[:count]]
    model.eval()
    right = 0
    for start in range(0, len(rows), 50):
        some = rows[start : start + 50]
        prompts = [
            chat_ids(tokenizer, [{"role": "user", "content": row["question"]}], add_generation_prompt=True)
            for row in some
        ]
        width = max(map(len, prompts))
        pad = tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=256, do_sample=False, use_cache=True, pad_token_id=pad
        )
        said = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        right += sum(number_of(one) == number_of(row["answer"]) for one, row in zip(said, some, strict=True))
    return right / len(rows)


def number_of(answer: str) -> float | None:
    """The last number in an answer, which is where GSM8K has the result."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    return float(found[-1].replace(",", "")) if found else None


class Bench:
    """The published model, its data, and what its trained copies are measured by."""

    def __init__(
        self,
        folder: Path,
        gsm8k: Path,
        novels: tuple[Path, ...],
        unseen: Path | None,
        text: Path | None,
        questions: tuple[list[str], Path],
        answers: int,
        length: int,
    ) -> None:
        self.folder, self.gsm8k, self.novels, self.unseen = folder, gsm8k, novels, unseen
        self.tokenizer = load_tokenizer(folder)
        self.text = spread(evaluation_tokens(text, self.tokenizer), 1024, 20) if text else None
        self.questions, self.answers, self.length = questions, answers, length

    def examples(self, task: Task, tuning: bool) -> tuple[list[Batch], list[Batch]]:
        """To train on, and held out."""
        count = HELD_OUT[task]
        if task == "cpt":
            if not self.novels or self.unseen is None:
                raise SystemExit("cpt needs --novels to train on and one --unseen")
            train = novel_batches(self.novels, self.tokenizer, self.length)
            test = novel_batches((self.unseen,), self.tokenizer, self.length)
            test = test[:: max(1, len(test) // count)]  # all over it
        else:
            train, test = (
                answer_batches(self.gsm8k / f"{split}.jsonl", self.tokenizer, self.length)
                for split in ("train", "test")
            )
        return train[:-count], train[-count:] if tuning else test[:count]

    def measure(self, model: Any, run: Record) -> Record:
        """What it has kept and learned beside its loss, in bfloat16, as it would be served."""
        model = model.eval().to(torch.bfloat16)
        found: Record = {}
        if self.text is not None:
            found["perplexity"] = secateurs.perplexity(model, self.text, length=1024)
        if self.questions[0]:
            tasks, folder = self.questions
            found["tasks"] = secateurs.evaluate_tasks(model, self.tokenizer, tasks, task_data=folder)
        if self.answers and run["task"] == "sft":
            file = self.gsm8k / "test.jsonl"
            found["right_answers"] = right_answers(model, self.tokenizer, file, self.answers)
        return found


def memory_of(trainee: Trainee, cell: str, batches: list[Batch]) -> int:
    """The most that a process has held that trained on these batches."""
    torch.set_num_threads(1)
    for _ in steps_of(trainee, cell, 0, batches, lambda model: {}):
        pass
    return peak_bytes()


def print_tables(rows: list[Record]) -> None:
    """One for each task: means over seeds, and what is above plain training's, least to most."""
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        plain = {row["seed"]: row for row in own if row["cell"] == "dense"}
        table = []
        for cell in dict.fromkeys(row["cell"] for row in own):
            found = [row for row in own if row["cell"] == cell]
            beside = [(row, plain[row["seed"]]) for row in found if row["seed"] in plain]
            margins = [row["validation_loss"] / other["validation_loss"] - 1 for row, other in beside]
            same = [(row, other) for row, other in beside if row.get("steps") == other["steps"]]
            table.append(
                [
                    cell,
                    len(found),
                    found[0].get("steps", 0),
                    mean(row.get("flops_of_dense", 0.0) for row in found),
                    mean(other["seconds"] / row["seconds"] for row, other in same) if same else "",
                    mean(row["validation_loss"] for row in found),
                    f"{mean(margins):+.2%} ({min(margins):+.2%} to {max(margins):+.2%})" if margins else "",
                    _mean(found, lambda row: row.get("perplexity")),
                    _mean(found, _zero_shot),
                    _mean(found, lambda row: row.get("right_answers")),
                ]
            )
        print(f"\n{task}\n")
        columns = ["", "seeds", "steps", "FLOPs of dense", "times as fast", "validation loss", "over plain"]
        print_table([*columns, "perplexity", "zero-shot", "right answers"], table)


def _mean(rows: list[Record], figure: Callable[[Record], float | None]) -> float | str:
    found = [value for value in map(figure, rows) if value is not None]
    return mean(found) if found else ""


def _zero_shot(row: Record) -> float | None:
    return mean(accuracy(metrics)[0] for metrics in row["tasks"].values()) if "tasks" in row else None


def main(
    cache: Path,
    gsm8k: Path,
    novels: tuple[Path, ...] = (),
    unseen: Path | None = None,
    text: Path | None = None,
    questions: tuple[Path, ...] = (),
    limit: int = 100,
    answers: int = 0,
    tasks: tuple[Task, ...] = ("cpt", "sft"),
    cells: tuple[str, ...] = ("dense", "auto", "sat"),
    seeds: tuple[int, ...] = (0,),
    steps: int = 60,
    batch_size: int = 4,
    length: int = 256,
    lora: int | None = None,
    learning_rate: float | None = None,
    float32: bool = False,
    same_time: str | None = None,
    tuning: bool = False,
    memory: bool = False,
    table: bool = False,
    model: str = "SmolLM2-135M-Instruct",
    results: Path = RESULTS / "sat_published.json",
) -> None:
    """See above.

    Args:
        cache: keeps what pip brings.
        gsm8k: a folder with its train.jsonl and test.jsonl.
        novels: to train on.
        unseen: one to measure that training on.
        text: of another kind, to see what is forgotten; twenty windows of 1024 tokens all over it.
        questions: folders with the zero-shot tasks' questions.
        limit: of each task.
        answers: how many of GSM8K's test questions to answer.
        cells: what takes turns, as `sat_quality.py` names them.
        lora: a rank, to train adapters.
        same_time: a cell in whose time plain training is run once more.
    """
    if table:
        print_tables(load(results))
        return
    if lora and learning_rate is None:
        raise SystemExit("--lora needs a --learning-rate: none was looked for")
    torch.set_num_threads(1)
    folder = Path(resolve(published_model(model, cache)))
    asked = cache / f"questions-{limit}"
    names = write_questions(questions, asked, limit) if questions and not tuning else []
    bench = Bench(
        folder,
        gsm8k,
        novels,
        unseen,
        None if tuning else text,
        (names, asked),
        0 if tuning else answers,
        length,
    )
    about: Record = {**environment(), "model": model, "batch_size": batch_size, "length": length}
    about |= {"bfloat16": not float32, "lora": lora, "tuning": tuning}
    about |= {"novels": [file.stem for file in novels], "unseen": unseen and unseen.stem}
    for task in tasks:
        rate = learning_rate or LEARNING_RATE[task]
        about[f"learning_rate_{task}"] = rate
        trainee = Trainee(folder, rate, bfloat16=not float32, lora=lora)
        examples = bench.examples(task, tuning)
        experiment = Experiment(task, trainee, examples, about, results, bench.measure)
        rows = load(results)
        if memory:
            batches = experiment.batches(0, MEMORY_STEPS)
            alone = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
            with alone:
                own = [
                    {
                        "task": task,
                        "cell": cell,
                        "peak_bytes": alone.submit(memory_of, trainee, cell, batches),
                    }
                    for cell in cells
                ]
                own = [{**row, "peak_bytes": row["peak_bytes"].result()} for row in own]
            save(results, about, [*rows, *own])
            print_table(
                ["", "cell", "peak, GB"], [[task, row["cell"], row["peak_bytes"] / 1e9] for row in own]
            )
            continue
        if not tuning and not any((row["task"], row["cell"]) == (task, "before") for row in rows):
            begin = Trainee(folder, rate).load()
            row = {"task": task, "cell": "before", "seed": 0}
            row["validation_loss"] = loss_on(begin, examples[1], batch_size)
            save(results, about, [*rows, {**row, **bench.measure(begin, row)}])
            del begin
        for seed in seeds:
            found = dict(zip(cells, experiment.rows(list(cells), seed, steps), strict=True))
            if same_time:
                share = found[same_time]["seconds"] / found["dense"]["seconds"]
                experiment.rows(["dense, same time"], seed, round(steps * share))
    if not memory:
        print_tables(load(results))


if __name__ == "__main__":
    tyro.cli(main)
