"""Text from files, folders and data sets by name.

`wikitext2`, `ptb` and `c4` have the splits and the joining of the SparseGPT line of papers, so that figures
compare with their tables: https://github.com/IST-DASLab/sparsegpt/blob/master/datautils.py, which
https://github.com/locuslab/wanda/blob/main/lib/data.py follows. Their scripts loaded data sets by code that
`datasets` no longer runs; the same rows come here from plain files (parquet, and for C4 gzipped JSON).
"""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from secateurs.text.conversations import FIELDS, Conversation, conversation_of, is_conversation, render
from secateurs.text.folders import Split, choose_split, files_of
from secateurs.text.formats import (
    FORMATS,
    ROW_SUFFIXES,
    Row,
    can_seek,
    format_of,
    read_rows,
    read_text,
    rows_from,
)

JOIN = "\n\n"
# Of a data set on the hub, which may hold terabytes, no more than this is read: some eight million tokens.
HUB_CHARACTERS = 32_000_000
# Files that hold no more are read into memory, and calibration tokenises them whole.
WHOLE = 4_000_000
# Rows that are looked at to see what they are.
FIRST = 100


class Piece(NamedTuple):
    """A part of a document, and whether it is the last."""

    text: str
    ends: bool


@dataclass(frozen=True)
class Text:
    """Documents, and what stands between them when they are read as one text.

    A separator of None says that they stay apart: a block of tokens then lies within one document.
    """

    documents: Collection[str]
    """A list, or for more than four million characters `Files`, which reads them anew each time."""
    separator: str | None = JOIN
    rendered: bool = False
    """Whether a chat template wrote the documents: the special tokens that belong there are in them."""

    @property
    def joined(self) -> str:
        """All documents as one text."""
        return "".join(self.pieces())

    def pieces(self) -> Iterator[str]:
        """The joined text bit by bit."""
        yield from joined(self.parts(), self.separator)

    def parts(self) -> Iterator[Piece]:
        """All documents, long ones in parts."""
        if isinstance(self.documents, Files):
            return self.documents.parts()
        return (Piece(document, True) for document in self.documents)


def joined(parts: Iterable[Piece], separator: str | None) -> Iterator[str]:
    """The pieces of the documents with the separator between these."""
    assert separator is not None, "these documents stay apart"
    ended = False
    for piece in parts:
        if ended:
            yield separator
        yield piece.text
        ended = piece.ends


@dataclass(frozen=True)
class Files(Collection[str]):
    """The documents in files, read when they are asked for: no more than a few are in memory at once."""

    files: tuple[Path, ...]
    reader: "_Reader"

    def __iter__(self) -> Iterator[str]:
        started: list[str] = []
        for text, ends in self.parts():
            started.append(text)
            if ends:
                yield "".join(started)
                started.clear()

    def __len__(self) -> int:
        return sum(piece.ends for piece in self.parts())

    def __contains__(self, document: object) -> bool:
        return any(document == other for other in self)

    @property
    def can_seek(self) -> bool:
        return all(can_seek(file) for file in self.files)

    def parts(self) -> Iterator[Piece]:
        """All documents, long ones in parts.

        Raises:
            ValueError: see `load_text`.
        """
        self.reader.begin()
        for file in self.files:
            yield from self._of_file(file)
        self.reader.finish()

    def parts_from(self, file: Path, share: float) -> Iterator[Piece]:
        """From a share of one file on to the end of the last, if the files can seek."""
        if format_of(file) == ".txt":
            yield from _with_end(read_text(file, share))
        else:
            within, rows = rows_from(file, self.reader.wanted, share)
            for row in rows:
                text = self.reader(row)
                if text is not None:
                    yield Piece(text[int(within * len(text)) :], True)
                within = 0.0
        for other in self.files[self.files.index(file) + 1 :]:
            yield from self._of_file(other)

    def _of_file(self, file: Path) -> Iterator[Piece]:
        if format_of(file) == ".txt":
            yield from _with_end(read_text(file))
            return
        for row in read_rows(file, self.reader.wanted):
            text = self.reader(row)
            if text is not None:
                yield Piece(text, True)


def _with_end(pieces: Iterator[str]) -> Iterator[Piece]:
    last = next(pieces, "")
    for piece in pieces:
        yield Piece(last, False)
        last = piece
    yield Piece(last, True)


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


def load_text(
    source: str | Path,
    *,
    field: str = "text",
    split: Split = "calibration",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Text:
    """Read text, or conversations as the model's chat template writes them.

    Args:
        source: a file of text (`.txt`, `.md`: one document, as it is) or of rows (`.jsonl`, `.json`, `.csv`,
            `.tsv`, `.parquet`, `.arrow`: a document a row), any of them packed (`.gz`), a folder of these
            (see `files_of`), `wikitext2`, `ptb`, `c4`, or a data set on the Hugging Face hub, `name` or
            `name:config`. A folder that is called like a data set is `./name`.
        field: where the rows of a file or of a data set on the hub keep their text; the three named data
            sets know theirs. Rows that have no such field but are conversations (see `conversation_of`), or
            keep their messages in it, are rendered.
        split: what the text is for. A data set, on the hub or in a folder, has its train split read for
            calibration, its test split (C4, and those without one: validation) for evaluation; other files
            are read whole for either. Of a data set on the hub that is not one of the three, the first 32
            million characters are read.
        tokenizer: writes conversations.

    Returns:
        The documents with what joins them: a blank line, but for the three named data sets; nothing between
        conversations. Files of more than four million characters are not read into memory. Rows whose field
        is null or missing are left out, with a warning that counts them.

    Raises:
        ValueError: there is no such file or data set, it cannot be read or decoded or reached, no row has
            the field, a row has no text in it, a conversation is refused, or there is no text. Names the file
            and the line or row.
    """
    path, name = Path(source), str(source)
    if name in PUBLISHED and not isinstance(source, Path):
        text = _from_published(name, PUBLISHED[name][split])
    elif path.exists():
        text = _from_files(find_files(path, split), field, tokenizer)
    else:
        rows = _from_hub(_hub_name(source), split)
        first = list(islice(rows, FIRST))
        reader = _Reader(first, field, tokenizer)
        text = reader.text(_first_characters(chain(first, rows), reader, name))
        reader.finish()
    if not isinstance(text.documents, Files) and all(map(is_blank, text.documents)):
        raise ValueError(f"'{source}' holds no text")
    return text


def load_conversations(source: str | Path, *, split: Split = "calibration") -> list[Conversation]:
    """Read conversations, in each of which an assistant answers, to train on.

    Args:
        source: a file of rows, a folder, or a data set on the hub, as `load_text` takes them; see
            `conversation_of` for the forms of a row.
        split: see `load_text`.

    Raises:
        ValueError: the source cannot be read, or a row is not a conversation; names the file and the line.
    """
    path = Path(source)
    rows: Iterator[Row]
    if path.exists():
        files = find_files(path, split)
        rows = chain.from_iterable(read_rows(file, FIELDS) for file in files if format_of(file) != ".txt")
        texts = [file for file in files if format_of(file) == ".txt"]
        if texts:
            raise ValueError(
                f"'{texts[0]}' is text without fields: conversations are rows ({', '.join(ROW_SUFFIXES)})"
            )
    else:
        rows = _from_hub(_hub_name(source), split)
    found, nulls = [], 0
    for row in rows:
        conversation = conversation_of(row)
        if conversation is None:
            nulls += 1
        elif not conversation.answers:
            raise ValueError(f"{row.where}: no message of the role 'assistant' that answers another")
        else:
            found.append(conversation)
    if not found:
        raise ValueError(f"'{source}' holds no conversations")
    if nulls:
        warnings.warn(f"'{source}': {nulls} rows without a conversation are left out", stacklevel=2)
    return found


def is_blank(document: str) -> bool:
    return not document or document.isspace()


def find_files(path: Path, split: Split) -> list[Path]:
    """The file, or those of the folder that `files_of` chooses.

    Raises:
        ValueError: it is of no format that can be read.
    """
    if path.is_dir():
        return files_of(path, split)
    if format_of(path) is None:
        raise ValueError(f"'{path}' is not one of {FORMATS}")
    return [path]


class _Reader:
    """Makes text of rows: sees in the first what they are, texts or conversations; counts what it skips."""

    def __init__(self, first: list[Row], field: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.field = field
        self.tokenizer = tokenizer
        self.wanted = (field, *FIELDS)
        self.begin()
        having = [row.value for row in first if isinstance(row.value, str) or field in row.value]
        lists = [value for value in having if isinstance(value, dict) and isinstance(value[field], list)]
        self.rendered = bool(lists) or (not having and any(map(is_conversation, first)))
        self.column = field if lists else None
        if self.rendered and tokenizer is None:
            raise ValueError(f"{first[0].where}: a conversation, which takes a tokenizer to be made text")

    def begin(self) -> None:
        self.skipped = 0
        self.read = 0
        self.lacking: Row | None = None  # the first row without the field

    def __call__(self, row: Row) -> str | None:
        text = self._rendered(row) if self.rendered else self._field(row)
        self.skipped += text is None
        self.read += text is not None
        return text

    def _rendered(self, row: Row) -> str | None:
        assert self.tokenizer is not None
        conversation = conversation_of(row, self.column)
        return None if conversation is None else render(conversation, self.tokenizer)

    def _field(self, row: Row) -> str | None:
        if isinstance(row.value, str):
            return row.value
        if self.field not in row.value:
            self.lacking = self.lacking or row
            return None
        value = row.value[self.field]
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{row.where}: field '{self.field}' is not text but {type(value).__name__}")
        return value

    def text(self, documents: Collection[str]) -> Text:
        return Text(documents, "", rendered=True) if self.rendered else Text(documents)

    def finish(self) -> None:
        """After the last row: an error if none had the field, a warning if some had none."""
        if self.lacking and not self.read:
            fields = ", ".join(map(str, self.lacking.value))
            raise ValueError(f"{self.lacking.where}: no field '{self.field}'; it has: {fields}")
        if self.skipped:
            warnings.warn(
                f"{self.skipped} of {self.skipped + self.read} rows are left out: no text in '{self.field}'",
                stacklevel=4,
            )


def _from_files(paths: list[Path], field: str, tokenizer: PreTrainedTokenizerBase | None) -> Text:
    with_rows = [path for path in paths if format_of(path) != ".txt"]
    rows = chain.from_iterable(read_rows(path, (field, *FIELDS)) for path in with_rows)
    reader = _Reader(list(islice(rows, FIRST)), field, tokenizer)
    files = Files(tuple(paths), reader)
    documents: list[str] = []
    started: list[str] = []
    characters = 0
    for text, ends in files.parts():
        started.append(text)
        characters += len(text)
        if characters > WHOLE:
            return reader.text(files)
        if ends:
            documents.append("".join(started))
            started.clear()
    return reader.text(documents)


def _from_published(name: str, published: _Published) -> Text:
    from datasets import load_dataset

    with _reaching_the_hub(name):
        return Text(load_dataset(**published.request)[published.field], published.separator)


def _hub_name(source: str | Path) -> str:
    if (
        isinstance(source, Path)
        or format_of(Path(source))
        or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", source)
    ):
        raise ValueError(f"no text at '{source}': neither a file nor a folder nor the name of a data set")
    return source


def _from_hub(source: str, split: Split) -> Iterator[Row]:
    from datasets import get_dataset_split_names, load_dataset

    path, _, config = source.partition(":")
    with _reaching_the_hub(source):
        splits = get_dataset_split_names(path, config or None)
    chosen = choose_split(splits, split, source)
    with _reaching_the_hub(source):
        rows = load_dataset(path, config or None, split=chosen, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield Row(row, f"'{source}', {chosen} split, row {number}")


def _first_characters(rows: Iterable[Row], reader: _Reader, source: str) -> list[str]:
    documents, characters = [], 0
    for number, row in enumerate(rows, start=1):
        text = reader(row)
        if text is None:
            continue
        documents.append(text)
        characters += len(text)
        if characters >= HUB_CHARACTERS:
            warnings.warn(f"'{source}': only its first {number} rows are read", stacklevel=3)
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
            f"pass the path of a file or of a folder of these: {FORMATS}"
        ) from error
