"""Files as rows: every format in flat memory, each row with its place, for the line that says what is wrong.

Lines are read here and not by the `datasets` library, which writes a copy of all it reads to its cache and
names no lines.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".xml", ".py")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
FORMATS = f"{', '.join(ROW_SUFFIXES[:1] + ROW_SUFFIXES[2:])}, .txt, .md, any of them as .gz"

CHARACTERS = 1 << 20  # of a text, read at once
ROW_GROUP = 1 << 26  # bytes of a parquet file that may be read to come to a row
ROWS = 1024  # of a parquet or Arrow file, made Python's at once
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
SURROGATE = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """A row of a file: its fields by name, or a text of its own (an array of strings has such rows)."""

    value: dict[str, Any] | str
    where: str


def _zstandard(path: Path) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))


PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}


def format_of(path: Path) -> str | None:
    """A suffix of ROW_SUFFIXES; ".txt" for any plain text; None for what is neither."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in ROW_SUFFIXES:
        return ".jsonl" if suffix == ".ndjson" else suffix
    return ".txt" if suffix in TEXT_SUFFIXES else None


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in PACKED


def without_surrogates(value: Any) -> Any:
    """The same with U+FFFD for each half of a surrogate pair that stands alone: no encoding has these."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(name): without_surrogates(item) for name, item in value.items()}
    return value


def read_text(path: Path, share: float = 0.0) -> Iterator[str]:
    """A plain text in pieces; from a share of its bytes on, if it is not packed.

    Raises:
        ValueError: it cannot be read or is not UTF-8; names the line.
    """
    with _reading(path), _open_bytes(path) as raw:
        number, start = 1, int(share * path.stat().st_size)
        if start:
            raw.seek(start)
            _to_next_character(raw)
        text = _as_text(raw)
        while piece := text.read(CHARACTERS):
            _check(piece, path, number, start)
            number += piece.count("\n")
            yield piece


def read_rows(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    """All rows of a file that is no plain text.

    Args:
        path: its suffix says the format.
        wanted: fields that matter; a file of columns must have one of them, and gives no others.

    Raises:
        ValueError: the file cannot be read or decoded, or is not what its suffix says; names line or row.
    """
    readers = {
        ".jsonl": _json_lines,
        ".json": _json_values,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    with _reading(path):
        yield from readers[format_of(path) or ""](path, wanted)


def can_seek(path: Path) -> bool:
    """Whether `read_text` or `rows_from` can begin amid this file, without reading much of it."""
    kind = format_of(path)
    if is_packed(path) or kind not in (".txt", ".jsonl", ".parquet", ".arrow"):
        return False
    if kind == ".parquet":
        with _reading(path), _open_columns(path) as source:
            metadata = _parquet_file(source).metadata
            groups = range(metadata.num_row_groups)
            return all(metadata.row_group(group).total_byte_size < ROW_GROUP for group in groups)
    if kind != ".jsonl":
        return True
    with open(path, "rb") as raw:
        return not raw.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def rows_from(path: Path, wanted: Sequence[str], share: float) -> tuple[float, Iterator[Row]]:
    """Rows from the one on that lies at a share (0 to 1) of a file that can seek.

    Of lines the share is by bytes, of columns by rows.

    Returns:
        How far within the first row the place is (0 to 1), and the rows.
    """
    if format_of(path) == ".jsonl":
        size = path.stat().st_size
        place = min(int(share * size), size - 1)
        start, end = _line_around(path, place)
        return (place - start) / max(end - start, 1), _lines_from(path, start)
    with _reading(path):
        count = _count(path)
    row = min(int(share * count), count - 1)
    reader = _parquet if format_of(path) == ".parquet" else _arrow

    def rows() -> Iterator[Row]:
        with _reading(path):
            yield from reader(path, wanted, row)

    return share * count - row, rows()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        reason = str(getattr(error, "strerror", None) or error or type(error).__name__).splitlines()[0]
        if isinstance(error, pyarrow.ArrowException) and format_of(path) in (".parquet", ".arrow"):
            kind = "a parquet" if format_of(path) == ".parquet" else "an Arrow"
            raise ValueError(f"'{path}' is not {kind} file ({reason})") from None
        raise ValueError(f"cannot read '{path}': {reason}") from None


def _open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, PACKED.get(path.suffix.lower(), lambda path: open(path, "rb"))(path))


def _as_text(raw: BinaryIO, newline: str | None = None) -> io.TextIOWrapper:
    """Decoded; bytes that are no UTF-8 become surrogates, which `_check` finds."""
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _check(text: str, path: Path, number: int, start: int = 0) -> None:
    """Raises ValueError if bytes were no UTF-8 in a text that begins in line `number` after a byte."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = number + text.count("\n", 0, error.start)
        byte = ord(text[error.start]) & 0xFF
        after = f" after byte {start}" if start else ""
        raise ValueError(f"'{path}' is not UTF-8 text (byte 0x{byte:02x} in line {line}{after})") from None


def _to_next_character(raw: BinaryIO) -> None:
    while (byte := raw.read(1)) and 0x80 <= byte[0] < 0xC0:
        pass
    if byte:
        raw.seek(-1, io.SEEK_CUR)


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, (dict, str)):
        raise ValueError(f"{where}: a {type(value).__name__}, not an object with fields")
    return Row(value, where)


def _json_lines(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    with _as_text(_open_bytes(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            if number == 1 and line.lstrip().startswith("["):
                break  # one array of all rows
            _check(line, path, number)
            yield _json_line(line, f"'{path}', line {number}")
        else:
            return
    yield from _json_values(path, wanted)


def _json_line(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    return _row(without_surrogates(value) if ESCAPED_SURROGATE.search(line) else value, where)


def _line_around(path: Path, place: int) -> tuple[int, int]:
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


def _lines_from(path: Path, start: int) -> Iterator[Row]:
    with _reading(path), open(path, "rb") as raw:
        raw.seek(start)
        for number, line in enumerate(_as_text(raw), start=1):
            if not line.isspace():
                _check(line, path, number, start)
                yield _json_line(line, f"'{path}', line {number} after byte {start}")


def _json_values(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    """Rows of an array, of an object with one array in it, or of objects one after another."""
    with _as_text(_open_bytes(path)) as file:
        reader = _JsonReader(file, path)
        if reader.peek() == "[":
            values: Iterator[Any] = reader.array()
        else:
            values = _values_of_objects(reader, path, wanted)
        for number, value in enumerate(values, start=1):
            yield _row(value, f"'{path}', row {number}")


def _values_of_objects(reader: "_JsonReader", path: Path, wanted: Sequence[str]) -> Iterator[Any]:
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


class _JsonReader:
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
        _check(content, self.path, self.line + held.count("\n"))
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
            if end < len(self.text) or not self.more():
                source = self.text[self.at : end]
                self.at = end
                return without_surrogates(value) if ESCAPED_SURROGATE.search(source) else value

    def holds_value(self) -> bool:
        """Whether the next value ends within one chunk."""
        while len(self.text) - self.at < CHARACTERS and self.more():
            pass
        try:
            self.decoder.raw_decode(self.text, self.at)
        except (ValueError, RecursionError):
            return len(self.text) - self.at < CHARACTERS
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


def _csv(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # its own is 128 KB, shorter than many a text
    with _as_text(_open_bytes(path), newline="") as file:

        def lines() -> Iterator[str]:
            for number, line in enumerate(file, start=1):
                _check(line, path, number)
                yield line.replace("\0", "")

        reader = csv.DictReader(lines(), delimiter="\t" if format_of(path) == ".tsv" else ",")
        try:
            _choose(list(reader.fieldnames or []), wanted, path)
            for row in reader:
                where = f"'{path}', line {reader.line_num}"
                if None in row:
                    raise ValueError(
                        f"{where}: more cells than the first line names: text with commas needs quotes"
                    )
                yield Row(row, where)
        except csv.Error as error:
            raise ValueError(f"'{path}', line {reader.line_num}: {error}") from None


def _choose(names: list[str], wanted: Sequence[str], path: Path) -> list[str]:
    """Those columns of a file that are wanted."""
    chosen = [name for name in names if name in wanted]
    if names and not chosen:
        raise ValueError(f"'{path}' has no field '{wanted[0]}'; it has: {', '.join(names)}")
    return chosen


def _parquet(path: Path, wanted: Sequence[str], start: int = 0) -> Iterator[Row]:
    with _open_columns(path) as source:
        file = _parquet_file(source)
        columns = _choose(file.schema_arrow.names, wanted, path)
        group, before = 0, 0
        while (
            group < file.num_row_groups - 1
            and before + (size := file.metadata.row_group(group).num_rows) <= start
        ):
            group, before = group + 1, before + size
        groups = list(range(group, file.num_row_groups))
        batches = file.iter_batches(batch_size=ROWS, row_groups=groups, columns=columns)
        yield from _rows_of(batches, path, before, start)


def _arrow(path: Path, wanted: Sequence[str], start: int = 0) -> Iterator[Row]:
    with _open_columns(path) as source:
        table = _arrow_table(source)
        table = table.select(_choose(table.column_names, wanted, path))
        yield from _rows_of(table.slice(start).to_batches(max_chunksize=ROWS), path, start, start)


@contextmanager
def _open_columns(path: Path) -> Iterator[Any]:
    """A file whose end must be read before its beginning: unpacked, where it is packed, beside memory."""
    import pyarrow

    if not is_packed(path):
        # Arrow's tables are used as they lie in the file; parquet has to be unpacked in any case.
        opened = pyarrow.memory_map(str(path)) if format_of(path) == ".arrow" else pyarrow.OSFile(str(path))
        with opened as source:
            yield source
        return
    with tempfile.TemporaryFile() as whole:
        with _open_bytes(path) as packed:
            shutil.copyfileobj(packed, whole, 1 << 20)
        whole.seek(0)
        yield whole


def _parquet_file(source: Any) -> Any:
    from pyarrow.parquet import ParquetFile

    # With a buffer a row group, which may be gigabytes, is read as it is needed.
    return ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)


def _arrow_table(source: Any) -> Any:
    import pyarrow

    try:
        return pyarrow.ipc.open_file(source).read_all()
    except pyarrow.ArrowInvalid:  # the other of Arrow's two formats, which `save_to_disk` writes
        source.seek(0)
        return pyarrow.ipc.open_stream(source).read_all()


def _count(path: Path) -> int:
    with _open_columns(path) as source:
        if format_of(path) == ".parquet":
            return int(_parquet_file(source).metadata.num_rows)
        return int(_arrow_table(source).num_rows)


def _rows_of(batches: Any, path: Path, number: int, start: int) -> Iterator[Row]:
    for batch in batches:
        if number + len(batch) > start:
            rows = batch.slice(max(start - number, 0))
            first = number + max(start - number, 0)
            for position in range(len(rows)):
                where = f"'{path}', row {first + position + 1}"
                yield Row(_plain(rows, position, where), where)
        number += len(batch)


def _plain(batch: Any, position: int, where: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    try:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            value = column[position].as_py()
            row[name] = value.decode() if isinstance(value, bytes) else _without_nulls(value)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason})") from None
    return row


def _without_nulls(value: Any) -> Any:
    """Fields that this row lacks and another has come as nulls: they are not there."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value
