"""What a model costs to run: bytes on disk and in memory, time to the first token, tokens per second."""

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from secateurs.checkpoint import Checkpoint, resolve
from secateurs.device import resolve_device
from secateurs.evaluation.perplexity import perplexity
from secateurs.runtime.generate import Pace, check_positions, greedy_tokens, memory_bytes
from secateurs.runtime.load import load_model
from secateurs.settings import OnDevice, takes
from secateurs.text import bos_id, evaluation_tokens, load_tokenizer, wants_bos

PROMPT_TOKENS = 128
NEW_TOKENS = 64
REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Args:
        model: as the caller named it.
        file_bytes: of its weight files.
        memory_bytes: that the process, or the GPU, holds more after loading the model and touching all its
            weights.
        seconds_to_first_token: for a prompt of PROMPT_TOKENS; the median of REPEATS.
        tokens_per_second: one token at a time, over NEW_TOKENS; the median of REPEATS.
        perplexity: on the caller's text, if there is one.
    """

    model: str
    file_bytes: int
    memory_bytes: int
    seconds_to_first_token: float
    tokens_per_second: float
    perplexity: float | None


@dataclass(frozen=True, kw_only=True)
class BenchSettings(OnDevice):
    """Measure what a model costs to run: bytes, memory, tokens per second, perplexity.

    Example: secateurs bench my-llama-70-small --against my-llama --text wikitext2
    """

    against: str | Path | None = None
    """Another model, to compare with."""

    text: str | Path | None = None
    """To measure perplexity on: a file, a folder, or a name as `eval` takes it."""


@takes(BenchSettings)
def bench(model: str | Path, *, settings: BenchSettings) -> list[Cost]:
    """Measures a model, and another beside it, each in a process of its own.

    Args:
        model: a model folder or a name on the Hugging Face hub, dense or compressed.

    Raises:
        ValueError: a model is broken, the device is not there, or the text cannot be had.
    """
    costs = []
    names = [str(name) for name in (model, settings.against) if name is not None]
    for name in names:
        Checkpoint(resolve(name))
    for name in names:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                costs.append(pool.submit(_cost, name, settings.text, settings.device).result())
            except BrokenProcessPool:
                raise OSError(
                    f"the process that measured '{name}' was ended, perhaps for want of memory"
                ) from None
    return costs


def _cost(name: str, text: str | Path | None, device: str | None) -> Cost:
    folder, where = resolve(name), resolve_device(device)
    tokenizer = None if text is None else load_tokenizer(folder)
    tokens = None if text is None or tokenizer is None else evaluation_tokens(text, tokenizer)
    before = memory_bytes(where)
    model = load_model(folder, device)
    check_positions(model.config, PROMPT_TOKENS + NEW_TOKENS)
    config = model.config.get_text_config(decoder=True)
    bos = bos_id(tokenizer) if tokenizer is not None and wants_bos(config.model_type) else None
    prompt = torch.randint(config.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(where)
    # Weights are memory-mapped: they come into memory when a first token reads them.
    next(greedy_tokens(model, prompt[:, :1], Pace()))
    memory = memory_bytes(where) - before
    paces = [_pace(model, prompt) for _ in range(REPEATS + 1)][1:]  # the first one warms up
    return Cost(
        model=name,
        file_bytes=Checkpoint(folder).bytes,
        memory_bytes=memory,
        seconds_to_first_token=statistics.median(pace.seconds_to_first for pace in paces),
        tokens_per_second=statistics.median(pace.tokens_per_second for pace in paces),
        perplexity=None if tokens is None else perplexity(model, tokens, bos=bos),
    )


def _pace(model: PreTrainedModel, prompt: torch.Tensor) -> Pace:
    pace = Pace()
    for _ in greedy_tokens(model, prompt, pace):
        if pace.tokens == NEW_TOKENS:
            break
    return pace


def table(costs: list[Cost]) -> str:
    """The costs as text, a column for each model."""
    lines = [("", *(cost.model for cost in costs))]
    lines.append(("file, MB", *(f"{cost.file_bytes / 1e6:.1f}" for cost in costs)))
    lines.append(("memory after load, MB", *(f"{cost.memory_bytes / 1e6:.1f}" for cost in costs)))
    lines.append(("time to first token, ms", *(f"{cost.seconds_to_first_token * 1e3:.1f}" for cost in costs)))
    lines.append(("tokens per second", *(f"{cost.tokens_per_second:.1f}" for cost in costs)))
    if costs[0].perplexity is not None:
        lines.append(("perplexity", *(f"{cost.perplexity:.3f}" for cost in costs)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
