"""The model card of a written folder: README.md, with the metadata that the Hugging Face hub reads.

It says what was done and what it was done to, and takes over what must be taken over: the licence, the
languages, the text of the card that was there.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from secateurs.checkpoint.writing import read_json, write_text

CARRIED = ("license", "license_name", "license_link", "language")
"""Metadata that stays true of a model with other weights."""

HUB_NAME = re.compile(r"(?!\.)[\w.-]{1,96}/(?!checkpoint-)(?!\.)[\w.-]{1,96}")
FOLDERS = {"model", "models", "out", "output", "outputs", "checkpoints", "data", "results", "runs", "tmp"}
"""What stands before a slash in paths, and is no owner of models."""


def write_card(
    folder: Path,
    checkpoint_folder: Path,
    model_name: str,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    usage: str,
    tags: Sequence[str],
) -> None:
    """Write `README.md` into a folder.

    Args:
        folder: where to.
        checkpoint_folder: of the model that it was made from.
        model_name: as the user gave it: a folder, or a name on the hub. A path never gets into the card.
        title: what was done, in a word or two: "pruned to 70%", "compressed".
        facts: names and values, in order: the method, the sparsity, figures. Of a path only the last part is
            written.
        usage: lines of Python that stand before the usual ones that load a model; may be empty.
        tags: for the hub, beside "secateurs".
    """
    metadata, text = read_card(checkpoint_folder)
    base = base_model(checkpoint_folder, model_name, metadata)
    kind = read_json(checkpoint_folder / "config.json").get("model_type")
    eyes = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    model, reader = (
        ("AutoModelForImageTextToText", "AutoProcessor")
        if eyes
        else ("AutoModelForCausalLM", "AutoTokenizer")
    )
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if eyes else "text-generation",
        tags=list(dict.fromkeys(["secateurs", *tags])),
        **{key: metadata[key] for key in CARRIED if isinstance(metadata.get(key), str | list)},
    )
    name = base.rpartition("/")[2] if base else "Model"
    what = (
        f"Made from [{base}](https://huggingface.co/{base}) with Secateurs."
        if base
        else ("Made with Secateurs.")
    )
    rows = "\n".join(f"| {_cell(key)} | {_cell(_without_path(value))} |" for key, value in facts)
    code = "\n".join(
        [
            *([usage] if usage else []),
            f"from transformers import {model}, {reader}",
            "",
            f'model = {model}.from_pretrained("this-folder")',
            f'{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained("this-folder")',
        ]
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, {title}",
        what,
        f"| | |\n| --- | --- |\n{rows}",
        f"```python\n{code}\n```",
    ]
    if text.strip():
        parts.append(f"The card of the model that it was made from follows.\n\n---\n\n{text.strip()}")
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a folder's README.md: empty where there is none, or none that is YAML."""
    file = folder / "README.md"
    if not file.is_file():
        return {}, ""
    content = file.read_text(encoding="utf-8", errors="replace")
    try:
        card = ModelCard(content, ignore_metadata_errors=True)
        return card.data.to_dict(), card.text
    except Exception:  # whatever the parser stumbles over: a card is no reason for a model not to be written
        return {}, re.sub(r"\A\s*---\s*\n.*?\n---\s*(\n|\Z)", "", content, flags=re.DOTALL)


def base_model(folder: Path, model_name: str, metadata: dict[str, Any]) -> str | None:
    """The hub's name of the model that a folder was made from, as far as it can be known.

    That is the name that the user gave; that in the hub's cache; or for a folder, what its card or its
    `config.json` says that it comes from.
    """
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", folder.resolve().as_posix())
    stated = metadata.get("base_model")
    candidates = (
        None if Path(model_name).exists() else model_name,
        f"{cached[1]}/{cached[2]}" if cached else None,
        stated[0] if isinstance(stated, list) and len(stated) == 1 else stated,
        read_json(folder / "config.json").get("_name_or_path"),
    )
    return next((name for name in candidates if _is_hub_name(name)), None)


def _is_hub_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and HUB_NAME.fullmatch(name) is not None
        and name.partition("/")[0].lower() not in FOLDERS
        and not Path(name).exists()
    )


def _without_path(value: str) -> str:
    """A fact's value, of which a path keeps its last part."""
    return Path(value).name if value.startswith(("/", "~", "./", "../")) else value


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
