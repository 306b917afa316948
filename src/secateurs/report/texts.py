"""What models say: continuations side by side, with where they part from the first one's."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from secateurs.report.figures import Group, Part, Section, Texts
from secateurs.report.sources import Source
from secateurs.runtime.generate import generate

WORD = re.compile(r"\s*\S+|\s+")


def differences(text: str, reference: str) -> list[Part]:
    """A text in pieces: words that a reference has in the same order, and others."""
    words, known = WORD.findall(text), WORD.findall(reference)
    parts: list[Part] = []
    for kind, _, _, first, last in SequenceMatcher(None, known, words, autojunk=False).get_opcodes():
        said = "".join(words[first:last])
        if kind != "equal" and (space := said[: len(said) - len(said.lstrip())]):
            parts.append(("same", space))  # a mark begins with its word
        if said.strip() or kind == "equal":
            parts.append(("same" if kind == "equal" else "other", said.lstrip() if kind != "equal" else said))
    return [part for part in parts if part[1]]


def texts(
    sources: Sequence[Source], dense: Path | None, prompts: Sequence[str], tokens: int, device: str | None
) -> Section:
    """How the dense model and each folder's go on from prompts, greedily.

    Raises:
        ValueError: there is no model; or see `secateurs.runtime.generate.generate`.
    """
    models = {"dense": dense} if dense else {}
    models |= {source.name: source.folder for source in sources if source.has_model}
    if prompts and not models:
        raise ValueError("no folder holds a model that could go on with a prompt")
    groups = []
    for prompt in prompts:
        said = {
            name: "".join(generate(folder, prompt=prompt, tokens=tokens, device=device)).strip()
            for name, folder in models.items()
        }
        first = next(iter(said.values()), "")
        columns: list[tuple[str, list[Part]]] = [
            (name, differences(text, first) if place else [("same", text)])
            for place, (name, text) in enumerate(said.items())
        ]
        groups.append(Group(_short(prompt) if len(prompts) > 1 else "", [Texts(prompt, columns)]))
    lead = "The likeliest tokens, one after the other. Marked is what the first model does not say."
    return Section("texts", "What they say", lead, groups)


def _short(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:30].rstrip()}..."
