"""Measure a model folder: load it, then perplexity on each text and lm-eval's tasks."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from secateurs import ranks
from secateurs.checkpoint import Checkpoint, check_place, resolve
from secateurs.device import resolve_device
from secateurs.evaluation.measured import Measured, write_measured
from secateurs.evaluation.perplexity import default_length, perplexity
from secateurs.evaluation.tasks import evaluate_tasks
from secateurs.runtime.convert import compressed_bytes
from secateurs.runtime.load import load_model
from secateurs.settings import InWindows, OnDevice, takes
from secateurs.text import bos_id, evaluation_tokens, load_tokenizer, wants_bos
from secateurs.training.model import read_config
from secateurs.version import __version__


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


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(InWindows, OnDevice):
    """Measure a model, dense or pruned: perplexity on texts, accuracy on lm-eval's tasks.

    Perplexity is that of the SparseGPT line of papers: the joined text in windows that do not overlap.

    Example: secateurs eval my-llama-70 --text wikitext2 novel.txt --tasks piqa
    """

    text: tuple[str | Path, ...] = ()
    """Texts: files, folders (docs/text.md says of what), datasets on the hub, or wikitext2, ptb, c4."""

    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks."""

    batch_size: int | None = None
    """Windows run at once, by default 4096 tokens' worth; of tasks questions, by default 8."""

    task_data: str | Path | None = None
    """A folder with the tasks' data, where the hub is out of reach."""

    limit: int | None = None
    """Documents per task. By default all."""

    output: str | Path | None = None
    """A folder to make for the figures (`secateurs.json`), which `secateurs report` draws."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit."""
        if not self.text and not self.tasks:
            raise ValueError("nothing to measure: give texts or tasks")
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        resolve_device(self.device)
        if self.output is not None and Path(self.output).exists():
            raise ValueError(f"'{self.output}' exists: give another output folder")

    @property
    def sources(self) -> tuple[str | Path, ...]:
        """The texts, also where a single one was given as itself."""
        return (self.text,) if isinstance(self.text, str | Path) else tuple(self.text)


@takes(EvaluateSettings)
def evaluate(model: str | Path, *, settings: EvaluateSettings) -> Iterator[Measurement]:
    """Measure a model, dense or pruned; each figure comes as soon as it is known.

    Where torchrun or accelerate has started several processes, they share the windows of a text. With an
    output, all figures are in its record once the last has come.

    Args:
        model: a Hugging Face model folder with safetensors, or a name on the hub.

    Raises:
        ValueError: the model, a text or a task cannot be had, or does not suit.
        FloatingPointError: a loss is NaN or infinite.
    """
    measurements, found, size = _measurements(model, settings), list[Measurement](), None
    if settings.output is not None:
        with ranks.together():
            size = ranks.from_main(partial(_size, model, settings.output))
    while True:
        with ranks.together():  # but not while the caller looks at a figure
            measurement = next(measurements, None)
            if measurement is None and settings.output is not None:
                ranks.from_main(partial(_write, model, size, found, settings))
        if measurement is None:
            return
        found.append(measurement)
        yield measurement


def _size(model: str | Path, output: str | Path) -> int:
    """A model's bytes; what speaks against the place for its figures is found too."""
    check_place(Path(output), Checkpoint(resolve(model)))
    return compressed_bytes(model)


def _write(model: str | Path, size: int | None, found: list[Measurement], settings: EvaluateSettings) -> None:
    figures: dict[str, dict[str, float]] = {}
    for each in found:
        figures.setdefault(each.on, {})[each.metric] = each.value
    folder = resolve(model)
    decoder = read_config(Checkpoint(folder)).get_text_config(decoder=True)
    told = {
        "model": str(model),
        "text": [str(source) for source in settings.sources],
        "tasks": list(settings.tasks),
        "limit": settings.limit,
        "length": settings.length or default_length(decoder),
        "field": settings.field,
        "bos": "yes" if wants_bos(decoder.model_type, settings.asked_bos) else "no",
    }
    output = Path(str(settings.output))
    output.mkdir(parents=True, exist_ok=True)
    row = Measured(str(model), size, figures)
    write_measured(output, [row], {"settings": told, "versions": {"secateurs": __version__}})


def _measurements(model: str | Path, settings: EvaluateSettings) -> Iterator[Measurement]:
    folder, shown = resolve(model), ranks.is_main()
    tokenizer = load_tokenizer(folder)
    texts = []
    for source in settings.sources:
        start = time.perf_counter()
        tokens = evaluation_tokens(source, tokenizer, field=settings.field, progress=shown)
        texts.append((str(source), tokens, time.perf_counter() - start))
    loaded = load_model(folder, settings.device)
    kind = loaded.config.get_text_config(decoder=True).model_type
    bos = bos_id(tokenizer) if wants_bos(kind, settings.asked_bos) else None
    for source, tokens, seconds in texts:
        start = time.perf_counter()
        value = perplexity(
            loaded,
            tokens,
            length=settings.length,
            bos=bos,
            batch_size=settings.batch_size,
            progress=shown,
        )
        yield Measurement(source, "perplexity", value, seconds + time.perf_counter() - start)
    if settings.tasks:
        start = time.perf_counter()
        figures = ranks.from_main(
            lambda: evaluate_tasks(
                loaded,
                tokenizer,
                list(settings.tasks),
                task_data=settings.task_data,
                limit=settings.limit,
                batch_size=settings.batch_size or 8,
            )
        )
        seconds = time.perf_counter() - start
        for task, metrics in figures.items():
            for metric, value in metrics.items():
                yield Measurement(task, metric, value, seconds)
