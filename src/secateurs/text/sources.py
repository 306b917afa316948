"""Text from files, folders and data sets by name.

`wikitext2`, `ptb` and `c4` have the splits and the joining of the SparseGPT line of papers, so that figures
compare with their tables: https://github.com/IST-DASLab/sparsegpt/blob/master/datautils.py, which
https://github.com/locuslab/wanda/blob/main/lib/data.py follows. Their scripts loaded data sets by code that
`datasets` no longer runs; the same rows come here from plain files (parquet, and for C4 gzipped JSON).
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Split = Literal["calibration", "evaluation"]

SUFFIXES = (".txt", ".jsonl", ".parquet")
JOIN = "\n\n"
# Of a data set on the hub, which may hold terabytes, no more than this is read: some eight million tokens.
HUB_CHARACTERS = 32_000_000


@dataclass(frozen=True)
class Text:
    """Documents, and what stands between them when they are read as one text.

    A separator of None says that they stay apart: a block of tokens then lies within one document.
    """

    documents: Sequence[str]
    separator: str | None = JOIN

    @property
    def joined(self) -> str:
        """All documents as one text."""
        assert self.separator is not None, "these documents stay apart"
        return self.separator.join(self.documents)


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


def load_text(source: str | Path, *, field: str = "text", split: Split = "calibration") -> Text:
    """Read text.

    Args:
        source: a `.txt` file (one document, as it is), a `.jsonl` or `.parquet` file (a document a row), a
            folder of these (in the order of their names), `wikitext2`, `ptb`, `c4`, or a data set on the
            Hugging Face hub, `name` or `name:config`. A folder that is called like a data set is `./name`.
        field: where the rows of a file or of a data set on the hub keep their text; the three named data
            sets know theirs.
        split: what the text is for. A data set has its train split read for calibration, its test split
            (C4, and those without one: validation) for evaluation; a file is read whole for either. Of a
            data set that is not one of the three, the first 32 million characters are read.

    Returns:
        The documents with what joins them: a blank line, but for the three named data sets.

    Raises:
        ValueError: there is no such file or data set, it cannot be read or decoded or reached, a row lacks
            the field, or there is no text in it.
    """
    path, name = Path(source), str(source)
    if name in PUBLISHED and not isinstance(source, Path):
        text = _from_published(name, PUBLISHED[name][split])
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"no {', '.join(SUFFIXES)} files in the folder '{path}'")
        text = Text([document for file in files for document in _from_file(file, field)])
    elif path.exists():
        text = Text(list(_from_file(path, field)))
    elif (
        isinstance(source, Path)
        or path.suffix in SUFFIXES
        or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", name)
    ):
        raise ValueError(f"no text at '{source}': neither a file nor a folder nor the name of a data set")
    else:
        text = _from_hub(name, field, split)
    if not any(document and not document.isspace() for document in text.documents):
        raise ValueError(f"'{source}' holds no text")
    return text


def _from_file(path: Path, field: str) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8-sig")
        elif path.suffix == ".jsonl":
            yield from _from_jsonl(path, field)
        elif path.suffix == ".parquet":
            yield from _from_parquet(path, field)
        else:
            raise ValueError(f"'{path}' is not one of {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror or error}") from None


def _from_jsonl(path: Path, field: str) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"'{path}', line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"'{path}', line {number}: a {type(row).__name__}, not an object with fields"
                )
            yield _text_of(row, field, f"'{path}', line {number}")


def _from_parquet(path: Path, field: str) -> Iterator[str]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"'{path}' is not a parquet file ({str(error).splitlines()[0]})") from None
    names = file.schema_arrow.names
    if field not in names:
        raise ValueError(f"'{path}' has no field '{field}'; it has: {', '.join(names)}")
    values = (value for batch in file.iter_batches(columns=[field]) for value in batch.column(0).to_pylist())
    for number, value in enumerate(values, start=1):
        yield _text_of({field: value}, field, f"'{path}', row {number}")


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise ValueError(f"{where}: no field '{field}'; it has: {', '.join(row)}")
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: field '{field}' is not text but {type(row[field]).__name__}")
    return row[field]


def _from_published(name: str, published: _Published) -> Text:
    from datasets import load_dataset

    with _reaching_the_hub(name):
        return Text(load_dataset(**published.request)[published.field], published.separator)


def _from_hub(source: str, field: str, split: Split) -> Text:
    from datasets import get_dataset_split_names, load_dataset

    path, _, config = source.partition(":")
    wanted = ("train",) if split == "calibration" else ("test", "validation")
    with _reaching_the_hub(source):
        splits = get_dataset_split_names(path, config or None)
    chosen = next((name for name in wanted if name in splits), None)
    if chosen is None:
        raise ValueError(f"'{source}' has no {' or '.join(wanted)} split; it has: {', '.join(splits)}")
    with _reaching_the_hub(source):
        rows = load_dataset(path, config or None, split=chosen, streaming=True)
        return Text(_first_characters(rows, field, f"'{source}', {chosen} split"))


def _first_characters(rows: Iterable[dict[str, Any]], field: str, where: str) -> list[str]:
    documents, characters = [], 0
    for number, row in enumerate(rows, start=1):
        documents.append(_text_of(row, field, f"{where}, row {number}"))
        characters += len(documents[-1])
        if characters >= HUB_CHARACTERS:
            warnings.warn(f"{where}: only its first {number} rows are read", stacklevel=4)
            break
    return documents


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
            f"pass the path of a {', '.join(SUFFIXES)} file or of a folder of these"
        ) from error
