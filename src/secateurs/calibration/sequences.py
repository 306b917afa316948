"""Calibration sequences: read from texts, written by the dense model itself, or some of each.

Two steps, so that mistakes are found before work begins: `calibration_text` reads and checks, `tokens` lets
the model write what is still missing, and keeps it for a run that goes on.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from secateurs.calibration.sources import Calibration, Source, counts_of, interleaved, sources_of
from secateurs.calibration.written import Form, form_of, write
from secateurs.checkpoint import Checkpoint, write_tensors
from secateurs.checkpoint.config import model_class, quiet
from secateurs.runtime.load import load_model
from secateurs.text import calibration_blocks, check_tokens, load_tokenizer, wants_bos

AT_ONCE = 32_768
"""Tokens of the sequences that are written together: a step reads all weights, however many there are."""


class _Part(NamedTuple):
    """What one source gives."""

    samples: int
    read: Tensor | None
    """(samples, length); None if the model is to write them."""
    temperature: float = 1.0
    talking: int = 0
    """How many of them are conversations: the last ones."""


@dataclass(frozen=True)
class CalibrationText:
    """Calibration sequences, some of which the model may have to write yet."""

    checkpoint: Checkpoint
    device: torch.device
    samples: int
    length: int
    seed: int
    form: Form | None
    """Of what is to be written; None if all is read."""
    parts: list[_Part]
    record: dict[str, Any]
    """What decides which sequences these are, for `secateurs.json`. The sha256 is of those that are read."""

    def check_room(self) -> None:
        """Raises ValueError if the model, which has to be in memory whole to write, does not fit there."""
        needed, free, where = self.checkpoint.tensor_bytes, psutil.virtual_memory().available, "there are"
        if self.device.type == "cuda":
            free, where = torch.cuda.mem_get_info(self.device)[0], f"{self.device} has"
        if needed > free:
            raise ValueError(
                f"to write its own text the whole model has to be in memory: it takes {needed / 1e9:.1f} GB, "
                f"{where} {free / 1e9:.1f} GB free; give a text instead of 'self'"
            )

    @property
    def written(self) -> Tensor:
        """(samples,) bool: which of the sequences the model writes."""
        counts = [count for part in self.parts for count in (part.samples - part.talking, part.talking)]
        writes = [part.read is None for part in self.parts for _ in range(2)]
        return torch.tensor([writes[kind] for kind in interleaved(counts)])

    def tokens(self, memory: Path | None = None, *, progress: bool = False) -> Tensor:
        """All sequences, those of different sources evenly mixed.

        Args:
            memory: a folder where each batch that is written is kept, and found again.
            progress: show a progress bar on standard error while the model writes.

        Returns:
            (samples, length) int64 token ids on the CPU.

        Raises:
            FloatingPointError: the model's predictions are not finite.
            ValueError: transformers cannot generate with the model, or it does not fit into memory.
        """
        kinds: list[Tensor] = []
        with _Writer(self, memory, progress) as writer:
            for part in self.parts:
                tokens = writer.written(part) if part.read is None else part.read
                kinds += tokens.split([part.samples - part.talking, part.talking])
        rows = [iter(kind) for kind in kinds]
        return torch.stack([next(rows[kind]) for kind in interleaved([len(kind) for kind in kinds])])


class _Writer:
    """Lets the model write batch by batch; loads it when there is something that is not kept already."""

    def __init__(self, text: CalibrationText, memory: Path | None, progress: bool) -> None:
        self.text, self.memory, self.number = text, memory, 0
        self.model: PreTrainedModel | None = None
        total = sum(part.samples * (text.length - 1) for part in text.parts if part.read is None)
        self.bar, self.task = _progress_bar(total, shown=progress and total > 0)

    def __enter__(self) -> "_Writer":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.model = None
        if self.text.device.type == "cuda":
            torch.cuda.empty_cache()  # what it held would not be seen as free for activations

    def written(self, part: _Part) -> Tensor:
        """(samples, length)"""
        talks = [row >= part.samples - part.talking for row in range(part.samples)]
        rows, batches = max(1, AT_ONCE // self.text.length), []
        for first in range(0, part.samples, rows):
            batches.append(self._batch(talks[first : first + rows], part.temperature))
            self.number += 1
        return torch.cat(batches)

    def _batch(self, talks: list[bool], temperature: float) -> Tensor:
        text = self.text
        file = self.memory and self.memory / f"written-{self.number:05}.safetensors"
        if file and file.exists():
            self._advance(len(talks) * (text.length - 1))
            return load_file(file)["tokens"]
        if self.model is None:
            text.check_room()
            self.model = load_model(text.checkpoint.folder, str(text.device))
        assert text.form is not None
        with quiet():
            tokens = write(
                self.model,
                text.form,
                talks,
                length=text.length,
                seed=Random(f"{text.seed}/{self.number}").getrandbits(63),
                temperature=temperature,
                advance=self._advance,
            )
        if file:
            write_tensors(file, {"tokens": tokens})
        return tokens

    def _advance(self, tokens: int) -> None:
        self.bar.update(self.task, advance=tokens)


def calibration_text(
    calibration: Calibration,
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    device: torch.device,
    *,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    field: str = "text",
    bos: bool | None = None,
    progress: bool = False,
) -> CalibrationText:
    """Read calibration sequences, and see that the model can write those that it is to write.

    Args:
        calibration: see `Calibration` and `sources_of`.
        checkpoint: the dense model's files.
        config: of the model.
        device: where it writes.
        samples: sequences, of all sources together.
        length: tokens in each; by default as many as the model was made for, at most 2048.
        seed: of the places in texts, and of what is written.
        field: see `load_text`.
        bos: whether each begins with the beginning-of-text token; by default see `wants_bos`.
        progress: show a progress line on standard error.

    Raises:
        ValueError: a source cannot be had or is too short (see `calibration_blocks`), the model has fewer
            positions or tokens, or cannot write (see `form_of`).
    """
    decoder: Any = config.get_text_config(decoder=True)
    vocabulary, limit = int(decoder.vocab_size), getattr(decoder, "max_position_embeddings", None)
    bos = not isinstance(calibration, Tensor) and wants_bos(str(config.model_type), bos)
    form: Form | None = None
    parts: list[_Part] = []
    described: str | dict[str, Any] = "token ids"
    if isinstance(calibration, Tensor):
        tokens = calibration.cpu()
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
            raise ValueError("token ids must be an int64 tensor (samples, length), and not empty")
        samples, length = tokens.shape
    elif length is None:
        length = min(limit or 2048, 2048)
    if limit is not None and length > limit:
        raise ValueError(f"length {length} is more than the {limit} positions that the model was made for")
    if isinstance(calibration, Tensor):
        parts.append(_Part(samples, tokens))
    else:
        sources = sources_of(calibration)
        counts = counts_of(sources, samples)
        tokenizer = load_tokenizer(checkpoint.folder)
        if any(source.writer for source in sources):
            form = form_of(tokenizer, config, bos=bos)
            if not model_class(config)[0].can_generate():
                raise ValueError(
                    f"transformers cannot generate with a model of type {config.model_type}: "
                    "give a text instead of 'self'"
                )
            check_tokens(torch.tensor(form.forced), vocabulary)
        for source, count in zip(sources, counts, strict=True):
            if source.writer is None:
                blocks = calibration_blocks(
                    source.text,
                    tokenizer,
                    samples=count,
                    length=length,
                    seed=seed,
                    field=field,
                    bos=bos,
                    progress=progress,
                )
                parts.append(_Part(count, blocks))
            else:
                assert form is not None
                parts.append(_Part(count, None, source.writer.temperature, form.talking(count)))
        described = _described(sources, parts)
    read = [part.read for part in parts if part.read is not None]
    for tokens in read:
        check_tokens(tokens, vocabulary)
    record = {
        "source": described,
        "field": field,
        "bos": bos,
        "samples": samples,
        "length": length,
        "seed": seed,
        "sha256": sha256_of(torch.cat(read)) if read else None,
    }
    return CalibrationText(checkpoint, device, samples, length, seed, form, parts, record)


def sha256_of(tokens: Tensor) -> str:
    """Of token ids on the CPU."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def _described(sources: list[Source], parts: list[_Part]) -> str | dict[str, Any]:
    """Where sequences are from, for the record: one text's name, or by name what each source gives."""
    if len(sources) == 1 and parts[0].read is not None:
        return str(sources[0].text)
    return {
        str(source.text): {
            "share": source.share,
            "samples": part.samples,
            **(
                {}
                if part.read is not None
                else {"temperature": part.temperature, "conversations": part.talking}
            ),
        }
        for source, part in zip(sources, parts, strict=True)
    }


def in_words(record: dict[str, Any]) -> str:
    """What a record says of calibration text, for people."""
    source = record["source"]
    if isinstance(source, dict):  # several, or what the model wrote
        source = ", ".join(f"{name} ({given['samples']})" for name, given in source.items())
    return f"{record['samples']} x {record['length']} tokens of {source}"


def _progress_bar(tokens: int, *, shown: bool) -> tuple[Progress, TaskID]:
    columns = (TextColumn("writing text"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)
    return bar, bar.add_task("", total=tokens)
