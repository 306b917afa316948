"""What models answer to the same prompts, and token by token how far their predictions are apart."""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import read_config
from secateurs.evaluation.divergence import divergences
from secateurs.runtime.generate import Pace, check_positions, ends_of, greedy_tokens, prompt_ids
from secateurs.runtime.load import load_model
from secateurs.text import load_tokenizer


@dataclass(frozen=True)
class Answer:
    """How a model goes on from a prompt, one likeliest token after another."""

    tokens: tuple[int, ...]
    """New ones; the last may be one that ends a text."""
    pieces: tuple[str, ...]
    """What each token adds to the text: nothing, where a character takes several or a text ends."""
    divergence: tuple[float, ...] | None = None
    """KL(first || this) of what the first model and this one predict, in nats, at each token of the first
    one's answer. None of the first itself, and where vocabularies differ."""
    parts: int | None = None
    """The place of the first token in which the two answers differ; None where they do not, or where
    vocabularies do."""

    @property
    def text(self) -> str:
        """The pieces together."""
        return "".join(self.pieces)

    @property
    def mean(self) -> float | None:
        """Of the divergence, per token."""
        return sum(self.divergence) / len(self.divergence) if self.divergence else None


@dataclass(frozen=True)
class _Model:
    """What is known of a model before its weights are read."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    """Of its predictions."""
    prompts: list[Tensor]
    """(1, length) token ids each."""

    def speaks_as(self, other: "_Model") -> bool:
        """Whether tokens mean the same in both."""
        return (
            self.vocabulary == other.vocabulary and self.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        )


def answers(
    folders: Sequence[Path],
    prompts: Sequence[str],
    tokens: int,
    device: str | None = None,
    *,
    one_vocabulary: bool = False,
) -> list[list[Answer]]:
    """Each model's answer to each prompt: of each prompt a list in the models' order.

    One model at a time is in memory. Of the first one's predictions along its answers, which the others are
    held against, (prompts x tokens, vocabulary) stay in main memory.

    Args:
        folders: model folders, dense or compressed.
        prompts: texts to go on with.
        tokens: at most so many new ones; fewer where a model ends its text.
        device: as in `load_model`.
        one_vocabulary: refuse models of another vocabulary than the first one's.

    Raises:
        ValueError: a model is broken or has no tokenizer, a prompt is empty, or a model was not made for so
            many tokens. All of these but broken weights are found before any weights are read.
        FloatingPointError: a prediction is NaN or infinite.
    """
    models = [_model(folder, prompts, tokens) for folder in folders]
    for model in models if one_vocabulary else ():
        if not model.speaks_as(models[0]):
            raise ValueError(
                f"'{models[0].folder}' and '{model.folder}' have different vocabularies: only models with "
                "one vocabulary can be compared token by token"
            )
    found: list[list[Answer]] = []
    reference: list[Tensor] = []  # of each prompt the first model's predictions, (tokens, vocabulary)
    for model in models:
        loaded = load_model(model.folder, device)
        alike = model.speaks_as(models[0])
        said = []
        for place, ids in enumerate((models[0] if alike else model).prompts):  # to compare, the same tokens
            own = _answer(loaded, model.tokenizer, ids, tokens)
            if model is models[0]:
                reference.append(_predictions(loaded, ids, own).cpu())
            elif alike:
                first = found[0][place]
                given = _predictions(loaded, ids, first)
                own = Answer(
                    own.tokens,
                    own.pieces,
                    tuple(_finite(divergences(reference[place].to(given.device), given), model.folder)),
                    _parting(first.tokens, own.tokens),
                )
            said.append(own)
        found.append(said)
        del loaded
    return [list(each) for each in zip(*found, strict=True)]


def _model(folder: Path, prompts: Sequence[str], tokens: int) -> _Model:
    config, tokenizer = read_config(Checkpoint(folder)), load_tokenizer(folder)
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    for each in ids:
        check_positions(config, each.numel() + tokens)
    return _Model(folder, tokenizer, config.get_text_config(decoder=True).vocab_size, ids)


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, tokens: int) -> Answer:
    ends, new = ends_of(model), list[int]()
    for token in greedy_tokens(model, ids.to(model.device), Pace()):
        new.append(token)
        if token in ends or len(new) == tokens:
            break
    return Answer(tuple(new), tuple(_pieces(ids[0].tolist(), new, tokenizer)))


def _pieces(prompt: list[int], new: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each new token adds to the text: of all of it what is as it will stay, once the token is there."""
    texts = [
        str(tokenizer.decode(prompt + new[:count], skip_special_tokens=True)) for count in range(len(new) + 1)
    ]
    alike = (len(commonprefix([text, texts[-1]])) for text in texts)  # noqa: RUF071 - letter by letter
    sure = itertools.accumulate(alike, max)
    return [texts[-1][begin:end] for begin, end in itertools.pairwise(sure)]


@torch.inference_mode()
def _predictions(model: PreTrainedModel, ids: Tensor, answer: Answer) -> Tensor:
    """What a model predicts where each token of an answer is, (tokens, vocabulary) logits."""
    count = len(answer.tokens)
    whole = torch.cat([ids, torch.tensor([answer.tokens[:-1]], dtype=ids.dtype)], dim=1).to(model.device)
    few: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        few["logits_to_keep"] = count
    logits: Tensor = model(input_ids=whole, use_cache=False, **few).logits
    return logits[0, -count:]


def _finite(values: Tensor, folder: Path) -> list[float]:
    if not values.isfinite().all():
        raise FloatingPointError(f"predictions of '{folder}', or of the first model, are not finite")
    return values.tolist()


def _parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    pairs = enumerate(itertools.zip_longest(one, other))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), None)
