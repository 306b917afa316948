"""Rows of JSON and of comma-separated values, with the line of each.

They are read here and not by the `datasets` library, which writes a copy of all it reads to its cache and
names no lines.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from secateurs.text.files import (
    CHARACTERS,
    Row,
    as_text,
    check,
    choose,
    format_of,
    open_bytes,
    reading_file,
    without_surrogates,
)

HELD = 1 << 24  # characters of an object that is read before it is known to be a row or to hold rows
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, (dict, str)):
        raise ValueError(f"{where}: a {type(value).__name__}, not an object with fields")
    return Row(value, where)


def json_lines(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    with as_text(open_bytes(path)) as lines:
        first = True
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            if first and line.lstrip().startswith("["):
                break  # one array of all rows
            first = False
            check(line, path, number)
            yield _json_line(line, f"'{path}', line {number}")
        else:
            return
    yield from json_values(path, wanted)


def _json_line(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    return _row(without_surrogates(value) if ESCAPED_SURROGATE.search(line) else value, where)


def json_lines_from(path: Path, start: int) -> Iterator[Row]:
    with reading_file(path), open(path, "rb") as raw:
        raw.seek(start)
        for number, line in enumerate(as_text(raw), start=1):
            if not line.isspace():
                check(line, path, number, start)
                yield _json_line(line, f"'{path}', line {number} after byte {start}")


def json_values(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    """Rows of an array, of an object with one array in it, or of objects one after another."""
    with as_text(open_bytes(path)) as file:
        reader = JsonReader(file, path)
        if reader.peek() == "[":
            values: Iterator[Any] = reader.array()
        else:
            values = _values_of_objects(reader, path, wanted)
        for number, value in enumerate(values, start=1):
            yield _row(value, f"'{path}', row {number}")


def _values_of_objects(reader: "JsonReader", path: Path, wanted: Sequence[str]) -> Iterator[Any]:
    if reader.peek() != "{" or reader.holds_value():
        first = reader.value()
        if reader.peek():
            yield first
            while reader.peek():
                yield reader.value()
        elif isinstance(first, dict):
            yield from _rows_within(first, path, wanted)
        elif first is not None:
            yield first
        return
    # An object too large to be held: that of its arrays is streamed which there is.
    streamed: list[str] = []
    for name in reader.names():
        if reader.peek() != "[":
            reader.value()
            continue
        streamed.append(name)
        if len(streamed) > 1:
            raise ValueError(f"'{path}' holds several lists of rows: {', '.join(streamed)}")
        yield from reader.array()


def _rows_within(value: dict[str, Any], path: Path, wanted: Sequence[str]) -> Iterator[Any]:
    lists = [name for name, item in value.items() if isinstance(item, list)]
    rows = [name for name in lists if value[name] and isinstance(value[name][0], (dict, str))]
    if wanted and wanted[0] in rows and isinstance(value[wanted[0]][0], str):
        yield from value[wanted[0]]  # a column
    elif any(name in value for name in wanted) or not lists:
        yield value
    elif len(rows) > 1:
        raise ValueError(f"'{path}' holds several lists of rows: {', '.join(rows)}")
    else:
        yield from value[rows[0]] if rows else []


class JsonReader:
    """JSON values of a stream, of which no more is held than one value and a chunk."""

    def __init__(self, file: io.TextIOWrapper, path: Path) -> None:
        self.file = file
        self.path = path
        self.text = ""
        self.at = 0
        self.line = 1
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Read on, at least as much as is held; whether there was more."""
        held = self.text[self.at :]
        self.line += self.text.count("\n", 0, self.at)
        content = self.file.read(max(CHARACTERS, len(held)))
        check(content, self.path, self.line + held.count("\n"))
        self.text, self.at = held + content, 0
        return bool(content)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise ValueError(f"'{self.path}' is not JSON ({error})") from None
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                if not (cut_off and self.more()):
                    self.fail(error.msg, error.pos)
                continue
            # A number may go on in what is not read yet.
            if (end < len(self.text) and self.text[end] not in "0123456789.eE+-") or not self.more():
                source = self.text[self.at : end]
                self.at = end
                return without_surrogates(value) if ESCAPED_SURROGATE.search(source) else value

    def holds_value(self) -> bool:
        """Whether the next value is small enough to be held."""
        while len(self.text) - self.at < HELD and self.more():
            pass
        try:
            self.decoder.raw_decode(self.text, self.at)
        except (ValueError, RecursionError):
            return len(self.text) - self.at < HELD
        return True

    def array(self) -> Iterator[Any]:
        self.expect("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.expect(",")
        self.expect("]")

    def names(self) -> Iterator[str]:
        """Names of an object's fields; the value of each is to be read before the next."""
        self.expect("{")
        while self.peek() != "}":
            name = self.value()
            self.expect(":")
            self.peek()
            yield str(name)
            if self.peek() != "}":
                self.expect(",")
        self.expect("}")

    def expect(self, character: str) -> None:
        if self.peek() != character:
            self.fail(f"Expecting '{character}'", self.at)
        self.at += 1

    def fail(self, message: str, position: int) -> None:
        line = self.line + self.text.count("\n", 0, position)
        raise ValueError(f"'{self.path}', line {line}: not JSON ({message})")


def csv_rows(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # its own is 128 KB, shorter than many a text
    with as_text(open_bytes(path), newline="") as file:

        def lines() -> Iterator[str]:
            for number, line in enumerate(file, start=1):
                check(line, path, number)
                yield line.replace("\0", "")

        reader = csv.DictReader(lines(), delimiter="\t" if format_of(path) == ".tsv" else ",")
        try:
            choose(list(reader.fieldnames or []), wanted, path)
            for row in reader:
                where = f"'{path}', line {reader.line_num}"
                if None in row:
                    raise ValueError(
                        f"{where}: more cells than the first line names: text with commas needs quotes"
                    )
                yield Row(row, where)
        except csv.Error as error:
            raise ValueError(f"'{path}', line {reader.line_num}: {error}") from None


def line_around(path: Path, place: int) -> tuple[int, int]:
    """Where the line that holds a byte begins and ends."""
    block = 1 << 16
    with open(path, "rb") as raw:
        start, above = 0, place
        while above > 0 and not start:
            below = max(above - block, 0)
            raw.seek(below)
            content = raw.read(above - below)
            start = max(content.rfind(b"\n"), content.rfind(b"\r")) + 1
            start, above = below + start if start else 0, below
        raw.seek(place)
        end = place
        while content := raw.read(block):
            found = re.search(rb"[\r\n]", content)
            if found:
                return start, end + found.start()
            end += len(content)
        return start, end
