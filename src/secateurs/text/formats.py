"""Every format as pieces of text or as rows, in flat memory, from the beginning or from amid a file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from secateurs.text.columns import arrow_rows, count_rows, has_small_groups, parquet_rows
from secateurs.text.files import (
    CHARACTERS,
    Row,
    as_text,
    check,
    format_of,
    is_packed,
    open_bytes,
    reading_file,
    to_next_character,
)
from secateurs.text.lines import csv_rows, json_lines, json_lines_from, json_values, line_around


def read_text(path: Path, share: float = 0.0) -> Iterator[str]:
    """A plain text in pieces; from a share of its bytes on, if it is not packed.

    Raises:
        ValueError: it cannot be read or is not UTF-8; names the line.
    """
    with reading_file(path), open_bytes(path) as raw:
        number, start = 1, int(share * path.stat().st_size)
        if start:
            raw.seek(start)
            to_next_character(raw)
        text = as_text(raw)
        while piece := text.read(CHARACTERS):
            check(piece, path, number, start)
            number += piece.count("\n")
            yield piece


def read_rows(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    """All rows of a file.

    Args:
        path: its suffix says the format; one that says none means lines of JSON.
        wanted: fields that matter; a file of columns must have one of them, and gives no others.

    Raises:
        ValueError: the file cannot be read or decoded, or is not what its suffix says; names line or row.
    """
    readers = {
        ".json": json_values,
        ".csv": csv_rows,
        ".tsv": csv_rows,
        ".parquet": parquet_rows,
        ".arrow": arrow_rows,
    }
    with reading_file(path):
        yield from readers.get(format_of(path) or "", json_lines)(path, wanted)


def can_seek(path: Path) -> bool:
    """Whether `read_text` or `rows_from` can begin amid this file, without reading much of it."""
    kind = format_of(path)
    if is_packed(path) or kind not in (".txt", ".jsonl", ".parquet", ".arrow"):
        return False
    if kind == ".parquet":
        with reading_file(path):
            return has_small_groups(path)
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
        start, end = line_around(path, place)
        return (place - start) / max(end - start, 1), json_lines_from(path, start)
    with reading_file(path):
        count = count_rows(path)
    row = min(int(share * count), count - 1)
    reader = parquet_rows if format_of(path) == ".parquet" else arrow_rows

    def rows() -> Iterator[Row]:
        with reading_file(path):
            yield from reader(path, wanted, row)

    return share * count - row, rows()
