"""Measure a model folder: load it, then perplexity on each text and lm-eval's tasks."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateurs.checkpoint import resolve
from secateurs.evaluation.perplexity import perplexity
from secateurs.evaluation.tasks import evaluate_tasks
from secateurs.runtime.load import load_model
from secateurs.text import evaluation_tokens, load_tokenizer


@dataclass(frozen=True)
class Measurement:
    """One figure of a model."""

    on: str
    """The text or the task."""
    metric: str
    value: float
    seconds: float
    """What it took; the metrics of a task, and tasks that run together, share theirs."""

    def __str__(self) -> str:
        return f"{self.on}: {self.metric} {self.value:.4f} ({self.seconds:.1f} s)"


def evaluate(
    model: str | Path,
    *,
    text: Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    length: int | None = None,
    field: str = "text",
    device: str | None = None,
    batch_size: int | None = None,
    task_data: str | Path | None = None,
    limit: int | None = None,
) -> Iterator[Measurement]:
    """Measure a model, dense or pruned; each figure comes as soon as it is known.

    Args:
        model: a Hugging Face model folder with safetensors, or a name on the hub.
        text: what to measure perplexity on; see `secateurs.text.load_text`.
        tasks: names of lm-eval's tasks; see `evaluate_tasks`, also for `task_data` and `limit`.
        length: tokens in a window of text; see `perplexity`.
        field: see `secateurs.text.load_text`.
        device: "cpu", "cuda", "cuda:1"...; by default a GPU where there is one.
        batch_size: windows run at once, by default 4096 tokens' worth; for tasks questions, by default 8.

    Raises:
        ValueError: the model, a text or a task cannot be had, or does not suit.
        FloatingPointError: a loss is NaN or infinite.
    """
    if not text and not tasks:
        raise ValueError("nothing to measure: give texts or tasks")
    folder = resolve(model)
    loaded = load_model(folder, device)
    tokenizer = load_tokenizer(folder)
    for source in text:
        start = time.perf_counter()
        tokens = evaluation_tokens(source, tokenizer, field=field)
        value = perplexity(loaded, tokens, length=length, batch_size=batch_size, progress=True)
        yield Measurement(str(source), "perplexity", value, time.perf_counter() - start)
    if tasks:
        start = time.perf_counter()
        figures = evaluate_tasks(
            loaded, tokenizer, list(tasks), task_data=task_data, limit=limit, batch_size=batch_size or 8
        )
        seconds = time.perf_counter() - start
        for task, metrics in figures.items():
            for metric, value in metrics.items():
                yield Measurement(task, metric, value, seconds)
