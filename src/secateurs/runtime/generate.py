"""Continues a prompt, token by token, with a dense or a compressed model."""

import inspect
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateurs.checkpoint import Checkpoint, resolve
from secateurs.checkpoint.config import read_config
from secateurs.runtime.load import load_model
from secateurs.runtime.settings import GenerateSettings
from secateurs.settings import takes
from secateurs.text import load_tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token for a byte, in vocabularies of the sentencepiece kind."""


@dataclass
class Pace:
    """How fast tokens came.

    Args:
        seconds_to_first: from the prompt to the first new token.
        seconds_after: from the first token to the last.
        tokens: new ones.
        memory_bytes: of the process, or on the GPU, at the last token.
    """

    seconds_to_first: float = 0.0
    seconds_after: float = 0.0
    tokens: int = 0
    memory_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """While decoding, one token at a time: without the first, which waits for the prompt."""
        return (self.tokens - 1) / self.seconds_after if self.tokens > 1 else float("nan")

    def count(self, seconds: float, device: torch.device) -> None:
        """A token more, so many seconds after the prompt."""
        if self.tokens == 0:
            self.seconds_to_first = seconds
        self.seconds_after = seconds - self.seconds_to_first
        self.tokens += 1
        self.memory_bytes = memory_bytes(device)

    def __str__(self) -> str:
        then = f", then {self.tokens_per_second:.1f} tokens per second" if self.tokens > 1 else ""
        memory = f"{self.memory_bytes / 1e6:.0f} MB of memory"
        return f"first token after {self.seconds_to_first:.2f} s{then}; {memory}"


def memory_bytes(device: torch.device) -> int:
    """What tensors take on a GPU, or this process of main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A prompt's tokens, (1, length); ValueError if there are none, or it is no text."""
    check_text(prompt, "the prompt")
    ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.numel() == 0:
        raise ValueError("there is nothing to generate: the prompt is empty")
    return ids


def check_text(text: str, what: str) -> None:
    """Raises ValueError for bytes that are no UTF-8, which Python passes on in what it reads as text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not UTF-8: {text!r}") from None


def ends_of(model: PreTrainedModel) -> set[int | None]:
    """The tokens that end a model's text."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set(ends if isinstance(ends, list) else [ends])


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model was made for, where it says so."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_positions(config: PretrainedConfig, tokens: int) -> None:
    """Raises ValueError if a model was not made for so many tokens."""
    positions = positions_of(config)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"prompt and new tokens are {tokens}, but the model is made for {positions}: ask for fewer"
        )


@torch.inference_mode()
def greedy_tokens(model: PreTrainedModel, prompt: Tensor, pace: Pace) -> Iterator[int]:
    """The likeliest next token, again and again, without end.

    Args:
        model: in evaluation mode.
        prompt: (1, length) token ids on the model's device.
        pace: is updated with each token.
    """
    start = time.perf_counter()
    accepted = inspect.signature(model.forward).parameters
    told: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "use_cache": True}
    if "logits_to_keep" in accepted:
        told["logits_to_keep"] = 1
    if "position_ids" in accepted:
        told["position_ids"] = torch.arange(prompt.shape[1], device=prompt.device)[None]
    ids, generator = prompt, cast(Any, model)  # not all that it is typed as can generate
    while True:
        # As `generate` prepares them: what a model keeps between tokens is its own affair.
        first = ids is prompt
        inputs = generator.prepare_inputs_for_generation(
            ids, next_sequence_length=None if first else 1, is_first_iteration=first, **told
        )
        output = model(**inputs, return_dict=True)
        told = generator._update_model_kwargs_for_generation(output, told)
        tokens = output.logits[:, -1:].float().argmax(-1)  # of bfloat16 torch takes five times as long
        ids = torch.cat([ids, tokens], dim=1)
        token = int(tokens)  # on a GPU this waits for the result
        pace.count(time.perf_counter() - start, model.device)
        yield token


@takes(GenerateSettings)
def generate(model: str | Path, *, settings: GenerateSettings, pace: Pace | None = None) -> Iterator[str]:
    """Continues a prompt greedily. What can be wrong is found before this returns.

    Args:
        model: a model folder or a name on the Hugging Face hub, dense or compressed.
        pace: is updated as tokens come.

    Returns:
        The text that follows, in pieces, each as soon as it is certain.

    Raises:
        ValueError: the model is broken or has no tokenizer, the prompt is empty, or no tokens are asked for
            or more than the model has positions for.
    """
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    ids = prompt_ids(settings.prompt, tokenizer)
    check_positions(read_config(Checkpoint(folder)), ids.numel() + settings.tokens)
    loaded = load_model(folder, settings.device)
    new_tokens = greedy_tokens(loaded, ids.to(loaded.device), pace or Pace())
    return pieces(ids[0].tolist(), new_tokens, settings.tokens, ends_of(loaded), tokenizer)


def pieces(
    prompt: list[int],
    tokens: Iterator[int],
    most: int,
    ends: set[int | None],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[str]:
    """What new tokens add to a prompt's text, in pieces that together are what decoding all at once gives.

    Prompt and new tokens are decoded together: by themselves new tokens would begin a text, where tokenizers
    of the sentencepiece kind leave out the space before the first word.

    Args:
        prompt: its tokens.
        tokens: new ones, at least `most` unless one of `ends` comes before.
        most: the number of new ones to take.
        ends: tokens that end a text.
        tokenizer: that made the prompt's tokens.
    """

    def decode(new: list[int]) -> str:
        return str(tokenizer.decode(prompt + new, skip_special_tokens=True))

    new: list[int] = []
    shown = text = decode(new)
    for token in tokens:
        new.append(token)
        finished = token in ends or len(new) == most
        before, text = text, decode(new)
        certain = text if finished else _certain(text, token, tokenizer)
        # A special token adds no text, and so makes nothing certain either.
        if len(certain) > len(shown) and (finished or text != before):
            yield certain[len(shown) :]
            shown = certain
        if finished:
            return


def _certain(text: str, token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of a text, whose last token is given, that no further token can change."""
    # A character may take several tokens; until the last of them it decodes to a replacement character. Where
    # each byte is a token of its own, a byte that does not fit spoils those before it.
    if text.endswith("\ufffd") or BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token))):
        return ""
    if getattr(
        tokenizer, "clean_up_tokenization_spaces", False
    ):  # a full stop takes away the space before it
        return text.rpartition(" ")[0]
    return text
