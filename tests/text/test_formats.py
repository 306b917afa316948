"""The same rows in every format, written by its own library, are the same text."""

import bz2
import csv
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.text import Split, lines, load_text

TEXTS = ['plain, with a "comma"', "line\u2028sep\x85 and\x0cfeed", "two\nlines", "", "naïve 日本 🙂", "last"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = pyarrow.Table.from_pylist(ROWS)


def _csv(path: Path, delimiter: str = ",") -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def _column(array: pyarrow.Array) -> Callable[[Path], None]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": array}), path)


def _feather(path: Path) -> None:
    with pyarrow.ipc.new_file(str(path), TABLE.schema) as file:
        file.write_table(TABLE)


def _zstandard(path: Path) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(JSON_LINES.encode())


def _packed_parquet(path: Path) -> None:
    plain = path.with_suffix("")
    pyarrow.parquet.write_table(TABLE, plain)
    path.write_bytes(gzip.compress(plain.read_bytes()))


def _write(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content.encode())


FORMATS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": _write(JSON_LINES),
    "a.JSONL": _write("\ufeff" + JSON_LINES),
    "a.ndjson": _write("\n  \n" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)),
    "cr.jsonl": _write(JSON_LINES.replace("\n", "\r")),
    "crlf.jsonl": _write(JSON_LINES.replace("\n", "\r\n") + "\r\n"),
    "array.jsonl": _write(json.dumps(ROWS)),
    "strings.json": _write(json.dumps(TEXTS)),
    "array.json": _write(json.dumps(ROWS, indent=2)),
    "lines.json": _write(JSON_LINES),
    "within.json": _write(json.dumps({"version": "1", "data": ROWS, "flags": []})),
    "column.json": _write(json.dumps({"text": TEXTS, "label": [1] * len(TEXTS)})),
    "a.csv": _csv,
    "a.tsv": lambda path: _csv(path, "\t"),
    "a.parquet": lambda path: pyarrow.parquet.write_table(TABLE, path, row_group_size=2),
    "large.parquet": _column(pyarrow.array(TEXTS, pyarrow.large_string())),
    "dictionary.parquet": _column(pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode()),
    "binary.parquet": _column(pyarrow.array([text.encode() for text in TEXTS], pyarrow.binary())),
    "a.arrow": _feather,
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSON_LINES.encode())),
    "a.json.bz2": lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(JSON_LINES.encode())),
    "a.jsonl.zst": _zstandard,
    "a.parquet.gz": _packed_parquet,
    "saved": lambda path: datasets.Dataset(TABLE).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    assert load_text(tmp_path / name).documents == TEXTS


@pytest.mark.parametrize("name", ["a.md", "UPPER.TXT", "a.txt.gz"])
def test_plain_texts(name: str, tmp_path: Path) -> None:
    content = "a\u2028b\n\nc ".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert load_text(tmp_path / name).documents == ["a\u2028b\n\nc "]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"te\\ud83d": "x", "text": "a\\ud83d b \\ud83d\\ude42 \\uDE00", "n": [{"\\udfff": 1}]}\n'
    )
    assert load_text(file).documents == ["a\ufffd b \U0001f642 \ufffd"]
    assert load_text(file, field="te\ufffd").documents == ["x"]
    array = tmp_path / "a.json"
    array.write_text("[" + file.read_text() + "]")
    assert load_text(array).documents == ["a\ufffd b \U0001f642 \ufffd"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_without_text_are_counted(suffix: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": 1}, {"id": 2, "text": "a"}, {"text": None}, {"text": "b"}]
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema({"text": "str"})), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    with pytest.warns(UserWarning, match="2 of 4 rows are left out: no text in 'text'"):
        assert load_text(file).documents == ["a", "b"]


def test_bytes_that_are_no_text_name_their_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    _column(pyarrow.array([b"fine", b"\xff"], pyarrow.binary()))(file)
    with pytest.raises(ValueError, match=r"a\.parquet', row 2: not UTF-8 text"):
        load_text(file)


# Objects that begin like one with rows within, arrays, numbers cut in two, text that looks like syntax.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=4), VALUES, min_size=1, max_size=3), min_size=2, max_size=5
    ),
    size=st.integers(1, 64),
    indent=st.none() | st.just(1),
    form=st.sampled_from(["array", "within", "streamed", "concatenated"]),
)
@settings(max_examples=60)
def test_json_is_read_in_chunks_of_any_size(
    rows: list[Any], size: int, indent: int | None, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def dump(value: Any) -> str:
        return json.dumps(value, indent=indent)

    file = tmp_path_factory.mktemp("json") / "a.json"
    within = dump({"meta": {"x": "]"}, "n": -1.5e3, "data": rows, "end": 10})
    text = {"array": dump(rows), "concatenated": " \n".join(map(dump, rows))}.get(form, within)
    file.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHARACTERS", size)
        if form == "streamed":
            patch.setattr(lines, "HELD", 1)
        assert [row.value for row in lines.json_values(file, ["no such field"])] == rows


def test_a_folder_is_read_with_those_in_it_but_not_the_hidden(tmp_path: Path) -> None:
    for name in (
        "b/2.txt",
        "a.txt",
        "b/c/3.md",
        ".git/x.txt",
        ".hidden.txt",
        "README.md",
        "LICENSE.txt",
        "d.py~",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert load_text(tmp_path).documents == ["a.txt", "b/2.txt", "b/c/3.md"]


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], "calibration", [0, 1]),
        (["data/test-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"], "calibration", [1]),
        (["data/test-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"], "evaluation", [0]),
        (["train.jsonl", "valid.jsonl"], "evaluation", [1]),
        (["dev/1.jsonl", "train/1.jsonl"], "evaluation", [0]),
        (["a-novel.jsonl", "the-train.jsonl"], "calibration", [0, 1]),
        (["notes.jsonl", "train.jsonl"], "calibration", [0, 1]),
    ],
)
def test_the_split_of_a_data_set_in_a_folder(
    files: list[str], split: Split, expected: list[int], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("# A data set")
    for number, name in enumerate(files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": str(number)}))
    assert load_text(tmp_path, split=split).documents == list(map(str, expected))


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [name, "x"]}) for name in ("train", "validation")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both", num_shards={"train": 2, "validation": 1})
    assert load_text(tmp_path / "both").documents == ["train", "x"]
    assert load_text(tmp_path / "both", split="evaluation").documents == ["validation", "x"]
    shutil.rmtree(tmp_path / "both" / "validation")
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match="has no test or validation split; it has: train"):
        load_text(tmp_path / "both", split="evaluation")
