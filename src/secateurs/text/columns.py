"""Rows of parquet and Arrow files, a few at a time."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateurs.text.files import Row, choose, format_of, is_packed, open_bytes

ROW_GROUP = 1 << 26  # bytes of a parquet file that may be read to come to a row
ROWS = 1024  # made Python's at once


def parquet_rows(path: Path, wanted: Sequence[str], start: int = 0) -> Iterator[Row]:
    with _open_columns(path) as source:
        file = _parquet_file(source)
        columns = choose(file.schema_arrow.names, wanted, path)
        group, before = 0, 0
        while (
            group < file.num_row_groups - 1
            and before + (size := file.metadata.row_group(group).num_rows) <= start
        ):
            group, before = group + 1, before + size
        groups = list(range(group, file.num_row_groups))
        batches = file.iter_batches(batch_size=ROWS, row_groups=groups, columns=columns)
        yield from _rows_of(batches, path, before, start)


def arrow_rows(path: Path, wanted: Sequence[str], start: int = 0) -> Iterator[Row]:
    with _open_columns(path) as source:
        table = _arrow_table(source)
        table = table.select(choose(table.column_names, wanted, path))
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
        with open_bytes(path) as packed:
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


def has_small_groups(path: Path) -> bool:
    """Whether any row of a parquet file can be come to without reading much."""
    with _open_columns(path) as source:
        metadata = _parquet_file(source).metadata
        groups = range(metadata.num_row_groups)
        return all(metadata.row_group(group).total_byte_size < ROW_GROUP for group in groups)


def count_rows(path: Path) -> int:
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
