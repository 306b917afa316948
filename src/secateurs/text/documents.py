"""Documents: rows made text, in a list or, of large files, read anew each time."""

import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from secateurs.text.conversations import FIELDS, conversation_of, is_conversation, render
from secateurs.text.files import Row, format_of
from secateurs.text.formats import can_seek, read_rows, read_text, rows_from

JOIN = "\n\n"


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
    reader: "Reader"

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


def is_blank(document: str) -> bool:
    return not document or document.isspace()


class Reader:
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
