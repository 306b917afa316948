"""Files as characters: unpacked, decoded; what is wrong with one in a line that names file and line."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".xml", ".py")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
FORMATS = f"{', '.join(ROW_SUFFIXES[:1] + ROW_SUFFIXES[2:])}, .txt, .md, any of them as .gz"

CHARACTERS = 1 << 20  # of a text, read at once
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


@contextmanager
def reading_file(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        reason = str(getattr(error, "strerror", None) or error or type(error).__name__).splitlines()[0]
        if isinstance(error, pyarrow.ArrowException) and format_of(path) in (".parquet", ".arrow"):
            kind = "a parquet" if format_of(path) == ".parquet" else "an Arrow"
            raise ValueError(f"'{path}' is not {kind} file ({reason})") from None
        raise ValueError(f"cannot read '{path}': {reason}") from None


def open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, PACKED.get(path.suffix.lower(), lambda path: open(path, "rb"))(path))


def as_text(raw: BinaryIO, newline: str | None = None) -> io.TextIOWrapper:
    """Decoded; bytes that are no UTF-8 become surrogates, which `check` finds."""
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def check(text: str, path: Path, number: int, start: int = 0) -> None:
    """Raises ValueError if bytes were no UTF-8 in a text that begins in line `number` after a byte."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = number + text.count("\n", 0, error.start)
        byte = ord(text[error.start]) & 0xFF
        after = f" after byte {start}" if start else ""
        raise ValueError(f"'{path}' is not UTF-8 text (byte 0x{byte:02x} in line {line}{after})") from None


def to_next_character(raw: BinaryIO) -> None:
    while (byte := raw.read(1)) and 0x80 <= byte[0] < 0xC0:
        pass
    if byte:
        raw.seek(-1, io.SEEK_CUR)


def choose(names: list[str], wanted: Sequence[str], path: Path) -> list[str]:
    """Those columns of a file that are wanted."""
    chosen = [name for name in names if name in wanted]
    if names and not chosen:
        raise ValueError(f"'{path}' has no field '{wanted[0]}'; it has: {', '.join(names)}")
    return chosen
