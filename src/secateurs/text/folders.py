"""Which files of a folder are read: all of a plain one, of a data set those of one split."""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from secateurs.text.files import FORMATS, format_of

Split = Literal["calibration", "evaluation"]

# What a data set's split may serve for, the better one first.
WANTED: dict[Split, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "validation")}
# The words that name a split in the `datasets` library.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ABOUT = re.compile(r"(readme|license|notice|dataset_infos?|dataset_dict|state)\b", re.IGNORECASE)


def files_of(folder: Path, split: Split) -> list[Path]:
    """The files of a folder and of the folders in it, in the order of their names.

    What `save_to_disk` wrote is read as it says. Where every file is named for a split, or lies in a folder
    that is (`data/train-00000-of-00002.parquet`, `test.jsonl`), the folder is a data set: its train split is
    for calibration, its test split, or for want of one validation, for evaluation. Any other is read whole,
    but for hidden files and folders, READMEs and licences.

    Raises:
        ValueError: there is no such file, or no such split.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _read(folder / "dataset_dict.json", "splits")
        return files_of(folder / choose_split(names, split, str(folder)), split)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [folder / file["filename"] for file in _read(folder / "state.json", "_data_files")]
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk goes into no others
        files += [Path(parent, name) for name in names if not name.startswith(".") and not ABOUT.match(name)]
    files = [file for file in files if format_of(file)]
    files.sort(key=lambda file: file.relative_to(folder).parts)
    if not files:
        raise ValueError(f"no files of text in the folder '{folder}' ({FORMATS})")
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    if None in splits.values():
        return files
    chosen = choose_split(sorted({name for name in splits.values() if name}), split, str(folder))
    return [file for file in files if splits[file] == chosen]


def choose_split(names: list[str], split: Split, source: str) -> str:
    """The split of a data set that serves.

    Raises:
        ValueError: none does.
    """
    chosen = next((name for name in WANTED[split] if name in names), None)
    if chosen is None:
        wanted = " or ".join(WANTED[split])
        raise ValueError(f"'{source}' has no {wanted} split; it has: {', '.join(names)}")
    return chosen


def _split_of(file: Path) -> str | None:
    for part in reversed(file.parts):
        word = re.split(r"[-_.]", part.lower(), maxsplit=1)[0]
        for split, words in WORDS.items():
            if word in words:
                return split
    return None


def _read(file: Path, name: str) -> list[Any]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read '{file}': {error!r}") from None
