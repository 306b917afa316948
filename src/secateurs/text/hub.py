"""Data sets by name, from the Hugging Face hub.

`wikitext2`, `ptb` and `c4` have the splits and the joining of the SparseGPT line of papers, so that figures
compare with their tables: https://github.com/IST-DASLab/sparsegpt/blob/master/datautils.py, which
https://github.com/locuslab/wanda/blob/main/lib/data.py follows. Their scripts loaded data sets by code that
`datasets` no longer runs; the same rows come here from plain files (parquet, and for C4 gzipped JSON).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from secateurs.text.documents import Text
from secateurs.text.files import FORMATS, Row, format_of
from secateurs.text.folders import Split, choose_split


class _Published(NamedTuple):
    request: dict[str, Any]
    field: str
    separator: str | None


_WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
_PTB = {
    "path": "ptb-text-only/ptb_text_only",
    "revision": "refs/convert/parquet",
    "data_files": {split: f"penn_treebank/{split}/*.parquet" for split in ("train", "test")},
}
_C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
_C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}

PUBLISHED: dict[str, dict[Split, _Published]] = {
    "wikitext2": {
        "calibration": _Published({**_WIKITEXT, "split": "train"}, "text", " "),
        "evaluation": _Published({**_WIKITEXT, "split": "test"}, "text", "\n\n"),
    },
    "ptb": {
        "calibration": _Published({**_PTB, "split": "train"}, "sentence", " "),
        "evaluation": _Published({**_PTB, "split": "test"}, "sentence", " "),
    },
    "c4": {
        "calibration": _Published(
            {"path": "allenai/c4", "data_files": _C4_TRAIN, "split": "train"}, "text", None
        ),
        "evaluation": _Published(
            {"path": "allenai/c4", "data_files": _C4_VALIDATION, "split": "validation[:1100]"}, "text", " "
        ),
    },
}


def from_published(name: str, published: _Published) -> Text:
    from datasets import load_dataset

    with _reaching_the_hub(name):
        return Text(load_dataset(**published.request)[published.field], published.separator)


def hub_name(source: str | Path) -> str:
    if (
        isinstance(source, Path)
        or format_of(Path(source))
        or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", source)
    ):
        raise ValueError(f"no text at '{source}': neither a file nor a folder nor the name of a data set")
    return source


def from_hub(source: str, split: Split) -> Iterator[Row]:
    from datasets import get_dataset_split_names, load_dataset

    path, _, config = source.partition(":")
    with _reaching_the_hub(source):
        splits = get_dataset_split_names(path, config or None)
    chosen = choose_split(splits, split, source)
    with _reaching_the_hub(source):
        rows = load_dataset(path, config or None, split=chosen, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield Row(row, f"'{source}', {chosen} split, row {number}")


@contextmanager
def _reaching_the_hub(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client, the network and the file system each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, ValueError):  # the hub was reached: a configuration or a field is not there
            raise ValueError(reason) from error
        raise ValueError(
            f"'{source}' is no file here and could not be had from the Hugging Face hub ({reason}); "
            f"pass the path of a file or of a folder of these: {FORMATS}"
        ) from error
