"""What models say: continuations side by side, where they part, and how far their predictions are apart."""

import math
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from secateurs.evaluation.answers import Answer, answers
from secateurs.report.figures import Column, Group, Part, Section, Texts

WORD = re.compile(r"\s*\S+|\s+")

END = "\u220e"
"""Stands for the token that ends a text."""


def prompts_of(prompt: str | Sequence[str]) -> list[str]:
    """The prompts, also where a single one was given as itself."""
    return [prompt] if isinstance(prompt, str) else list(prompt)


def check_prompts(prompts: Sequence[str], tokens: int) -> None:
    """Raises ValueError for what cannot be gone on with."""
    if not all(prompts):
        raise ValueError("a prompt is empty: give some words to go on with")
    if tokens < 1:
        raise ValueError(f"tokens are at least 1, not {tokens}")


def texts(models: Mapping[str, Path], prompts: Sequence[str], tokens: int, device: str | None) -> Section:
    """How models go on from prompts, greedily, each beside the first.

    Args:
        models: folders by the name that they are shown under.
        prompts: to go on with.
        tokens: at most so many new ones.
        device: as in `load_model`.

    Raises:
        ValueError: there is no model; or see `secateurs.evaluation.answers.answers`.
    """
    if prompts and not models:
        raise ValueError("no folder holds a model that could go on with a prompt")
    said = answers(list(models.values()), prompts, tokens, device) if prompts else []
    return section(list(models), prompts, said)


def section(names: Sequence[str], prompts: Sequence[str], said: Sequence[Sequence[Answer]]) -> Section:
    """What models answered, as `answers` gives it, in columns: a group for each prompt."""
    groups = [
        Group(_short(prompt) if len(prompts) > 1 else "", [beside(names, prompt, answered)])
        for prompt, answered in zip(prompts, said, strict=True)
    ]
    lead = (
        "The likeliest tokens, one after the other. Marked is what the first model does not say. Its own "
        "tokens are shaded by how far the others' predictions are from its (KL in nats) at each of them."
    )
    return Section("texts", "What they say", lead, groups)


def beside(names: Sequence[str], prompt: str, said: Sequence[Answer]) -> Texts:
    """Models' answers to a prompt: the first shaded by how far the others are from it, the others marked."""
    first, *others = said
    heard = {
        name: other.divergence for name, other in zip(names[1:], others, strict=True) if other.divergence
    }
    columns = [Column(names[0], "", _shaded(first, heard))]
    for name, other in zip(names[1:], others, strict=True):
        columns.append(Column(name, _note(first, other), differences(other.text.strip(), first.text.strip())))
    return Texts(prompt, columns)


def _note(first: Answer, other: Answer) -> str:
    if other.mean is None or other.divergence is None:
        return "another vocabulary"
    where = f"parts at token {other.parts + 1}" if other.parts is not None else "the same answer"
    return f"{where}; divergence {other.mean:.3f} nats per token, {max(other.divergence):.2f} at most"


def shade(nats: float) -> float:
    """Of a token, from 0 to 1, where predictions diverge by so much."""
    return 1 - math.exp(-nats)


def _shaded(answer: Answer, heard: Mapping[str, Sequence[float]]) -> list[Part]:
    """An answer, token by token, each as dark as it is far from the model that is farthest from it there."""
    if not heard:
        return [Part(answer.text.strip())]
    parts: list[Part] = []
    waiting: list[int] = []  # tokens that are only a part of a character
    for place, piece in enumerate(answer.pieces):
        waiting.append(place)
        if place + 1 == len(answer.pieces) and not piece:
            piece = END
        if piece:
            far = {name: max(values[i] for i in waiting) for name, values in heard.items()}
            named = [f"{name} {value:.3f}" if len(far) > 1 else f"{value:.3f}" for name, value in far.items()]
            text = piece if any(part.text for part in parts) else piece.lstrip()
            parts.append(Part(text, shade=shade(max(far.values())), tip=f"{', '.join(named)} nats"))
            waiting = []
    return [part for part in parts if part.text]


def differences(text: str, reference: str) -> list[Part]:
    """A text in pieces: words that a reference has in the same order, and others, which are marked."""
    words, known = WORD.findall(text), WORD.findall(reference)
    parts: list[Part] = []
    for kind, _, _, first, last in SequenceMatcher(None, known, words, autojunk=False).get_opcodes():
        said = "".join(words[first:last])
        if kind == "equal":
            parts.append(Part(said))
            continue
        marked = said.lstrip()
        parts += [Part(said[: len(said) - len(marked)]), Part(marked, marked=True)]  # it begins with its word
    return [part for part in parts if part.text]


def _short(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:30].rstrip()}..."
