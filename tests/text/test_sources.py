import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from secateurs.text import Split, Text, load_text, sources


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff one\n\n\ntwø\u2028 \n".encode())
    assert load_text(file) == load_text(str(file)) == Text([" one\n\n\ntwø\u2028 \n"])


def test_rows_are_documents_with_a_blank_line_between(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b", "other": "x"}, {"text": "", "other": "y"}, {"text": "c", "other": "z"}]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    jsonl.write_text(jsonl.read_text() + "\n  \n")  # blank lines are no rows
    parquet = write_parquet(tmp_path / "a.parquet", text=["a\u2028b", "", "c"], other=["x", "y", "z"])
    for file in (jsonl, parquet):
        assert load_text(file).joined == "a\u2028b\n\n\n\nc"
        assert load_text(file, field="other").joined == "x\n\ny\n\nz"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c.parquet", text=["5"])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "3"}, {"text": "4"}])
    (tmp_path / "a.txt").write_text("1\n2")
    (tmp_path / "README.md").write_text("not a text")
    assert load_text(tmp_path).documents == ["1\n2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"title": "x"}\n{"body": "y", "id": 1}\n',
            "a.jsonl', line 1: no field 'text'; it has: title",
        ),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', "a.jsonl', line 3: field 'text' is not text but int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl', line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', "a.jsonl', line 2: a list, not an object"),
        ("a.jsonl", b'\n{"text": "\xff"}\n', r"a.jsonl' is not UTF-8 text \(byte 0xff in line 2\)"),
        ("a.txt", b"un\ncaf\xe9 au lait", r"a.txt' is not UTF-8 text \(byte 0xe9 in line 2\)"),
        ("a.csv", b"text\nx\ncaf\xe9\n", r"a.csv' is not UTF-8 text \(byte 0xe9 in line 3\)"),
        ("a.csv", b"text\nx, y\n", "a.csv', line 2: more cells than the first line names"),
        ("a.csv", b"body,id\nx,1\n", "a.csv' has no field 'text'; it has: body, id"),
        ("a.json", b'[{"text": "x"},\n{"text": x}]', "a.json', line 2: not JSON"),
        ("a.json", b'[{"text": "x"}, 3]', "a.json', row 2: a int, not an object"),
        ("a.json", b'[{"text": "x"}', "a.json', line 1: not JSON"),
        ("a.json", b'{"train": [{"text": "x"}], "test": [{"text": "y"}]}', "several lists .*: train, test"),
        ("a.jsonl.gz", b"no gzip", "cannot read '.*a.jsonl.gz': Not a gzipped file"),
        ("a.arrow", b"no Arrow at all", "a.arrow' is not an Arrow file"),
        ("a.txt", b" \n\t", "a.txt' holds no text"),
        ("a.jsonl", b"", "a.jsonl' holds no text"),
        ("a.parquet", b"PAR1 no more", "a.parquet' is not a parquet file"),
        ("a.pdf", b"%PDF", "a.pdf' is not one of .jsonl, .json, .csv"),
    ],
)
def test_a_file_that_will_not_do_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_text(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_field_lists_what_it_has(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])
    with pytest.raises(ValueError, match=r"a\.parquet' has no field 'text'; it has: body, id"):
        load_text(file)
    with pytest.raises(ValueError, match=r"a\.parquet', row 1: field 'id' is not text but int"):
        load_text(file, field="id")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no files of text in the folder"):
        load_text(tmp_path)


@pytest.mark.parametrize(
    "source", ["missing.txt", "data/missing.jsonl", "./wikitext2", "a/b/c", "no such thing", ""]
)
def test_what_is_neither_a_file_nor_a_name_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no text at|in the folder"):
        load_text(source)


class Hub:
    """Stands in for `datasets`: notes what it is asked for, and has few rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]]) -> None:
        self.splits = splits
        self.request: dict[str, Any] = {}
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, name=None: list(splits))

    def load_dataset(self, path: str, name: str | None = None, **options: Any) -> datasets.Dataset:
        self.request = {"path": path, "name": name, **options}
        return datasets.Dataset.from_list(self.splits[options["split"]])


# What the published scripts ask for: the split, the field, what they join its rows with (None: not at all).
PUBLISHED = [
    ("wikitext2", "calibration", "train", "text", " "),
    ("wikitext2", "evaluation", "test", "text", "\n\n"),
    ("ptb", "calibration", "train", "sentence", " "),
    ("ptb", "evaluation", "test", "sentence", " "),
    ("c4", "calibration", "train", "text", None),
    ("c4", "evaluation", "validation[:1100]", "text", " "),
]

PTB = {
    "path": "ptb-text-only/ptb_text_only",
    "revision": "refs/convert/parquet",
    "data_files": {"train": "penn_treebank/train/*.parquet", "test": "penn_treebank/test/*.parquet"},
}
C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
REQUESTS = {
    ("wikitext2", "train"): {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    ("wikitext2", "test"): {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    ("ptb", "train"): PTB,
    ("ptb", "test"): PTB,
    ("c4", "train"): {"path": "allenai/c4", "data_files": C4_TRAIN},
    ("c4", "validation[:1100]"): {"path": "allenai/c4", "data_files": C4_VALIDATION},
}


@pytest.mark.parametrize(("name", "split", "asked", "field", "separator"), PUBLISHED)
def test_published_names(
    name: str,
    split: Split,
    asked: str,
    field: str,
    separator: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = Hub(monkeypatch, {asked: [{field: "one"}, {field: ""}, {field: "two"}]})
    text = load_text(name, split=split)
    assert (list(text.documents), text.separator) == (["one", "", "two"], separator)
    assert hub.request["split"] == asked
    request = {key: value for key, value in hub.request.items() if value is not None and key != "split"}
    assert request == REQUESTS[name, asked]


def test_a_folder_that_is_called_like_a_data_set_can_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert load_text("./ptb").joined == load_text(Path("ptb")).joined == "mine"


def test_any_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, {"train": [{"body": "a"}, {"body": "b"}], "validation": [{"body": "c"}]})
    assert load_text("someone/some-set:small", field="body").joined == "a\n\nb"
    assert hub.request == {"path": "someone/some-set", "name": "small", "split": "train", "streaming": True}
    assert load_text("some-set", field="body", split="evaluation").joined == "c"
    assert hub.request == {"path": "some-set", "name": None, "split": "validation", "streaming": True}
    with pytest.raises(ValueError, match="'some-set', train split, row 1: no field 'text'; it has: body"):
        load_text("some-set")


def test_a_huge_data_set_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, {"train": [{"text": "abcd"}] * 9})
    monkeypatch.setattr(sources, "HUB_CHARACTERS", 10)
    with pytest.warns(UserWarning, match="only its first 3 rows"):
        assert len(load_text("huge").documents) == 3


def test_a_data_set_without_a_fitting_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, {"train": [{"text": "a"}]})
    with pytest.raises(ValueError, match="no test or validation split; it has: train"):
        load_text("some-set", split="evaluation")


@pytest.mark.parametrize("name", ["wikitext2", "someone/some-set"])
def test_without_a_network_a_path_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub\nmany\nlines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(ValueError, match=r"Couldn't reach the hub\); pass the path of a") as caught:
        load_text(name)
    assert "\n" not in str(caught.value)


def test_an_unknown_configuration_is_not_taken_for_a_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: str, name: str | None = None) -> list[str]:
        raise ValueError(f"BuilderConfig '{name}' not found. Available: ['a']\nmore")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unknown)
    with pytest.raises(ValueError, match=r"^BuilderConfig 'b' not found. Available: \['a'\]$"):
        load_text("some-set:b")
