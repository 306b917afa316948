"""Texts too large to be tokenised whole (here those above a few hundred characters)."""

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from characters import characters
from secateurs.text import calibration_blocks, evaluation_tokens, load_text, sources, tokenising
from secateurs.training.data import packed_blocks

WORDS = [f"{number:04d} " * 20 for number in range(200)]  # 200 documents of 100 characters
SOURCES = ["a.txt", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "saved.arrow", "folder"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WHOLE", 500)
    monkeypatch.setattr(tokenising, "CHUNK", 4000)
    monkeypatch.setattr(tokenising, "OVERLAP", 400)


def write(path: Path, texts: list[str] = WORDS) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts)
    table = pyarrow.table({"text": texts})
    if path.name == "a.txt":
        path.write_text("\n\n".join(texts))
    elif path.name == "a.jsonl":
        path.write_text(lines)
    elif path.name == "a.json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif path.name == "a.csv":
        path.write_text("text\n" + "\n".join(texts))
    elif path.name == "a.jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name == "a.parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=30)
    elif path.name == "saved.arrow":
        with pyarrow.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=30)
    else:
        path.mkdir()
        for number in range(4):
            (path / f"{number}.txt").write_text("\n\n".join(WORDS[50 * number :][:50]))
    return path


@pytest.mark.parametrize("name", SOURCES)
def test_blocks_lie_in_the_text_all_over_it(name: str, tmp_path: Path) -> None:
    """Also across the ends of documents, files and groups of rows."""
    source = write(tmp_path / name)
    whole = "\n\n".join(WORDS)
    blocks = calibration_blocks(source, characters(begin=True), samples=64, length=250, seed=1)
    texts = ["".join(map(chr, block)) for block in blocks.tolist()]
    places = [whole.find(text) for text in texts]
    assert min(places) >= 0
    assert len(set(places)) > 60
    assert set(Counter(place * 4 // len(whole) for place in places)) == {0, 1, 2, 3}
    again = calibration_blocks(source, characters(begin=True), samples=64, length=250, seed=1)
    assert (again == blocks).all()
    assert not (calibration_blocks(source, characters(), samples=64, length=250, seed=2) == blocks).all()


@pytest.mark.parametrize("name", SOURCES)
def test_read_bit_by_bit_it_is_the_same_text(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / name)
    text = load_text(source)
    assert "".join(text.joined.split()) == "".join("".join(WORDS).split())
    assert evaluation_tokens(source, characters()).tolist() == [ord(letter) for letter in "\n\n".join(WORDS)]
    packed = packed_blocks(source, characters(), length=1).flatten().tolist()
    ends = {"a.txt": 1, "folder": 4}.get(name, len(WORDS))
    assert packed.count(2) == ends
    assert len(text.documents) == ends


def test_places_are_even_where_a_file_is_read_through(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "".join(letter * 999 + "\n" for letter in "abcdefghij"))
    blocks = calibration_blocks(file, characters(), samples=2000, length=1)
    counts = Counter(blocks.flatten().tolist())
    # 200 of each of ten letters are expected, with a deviation of about 13.
    assert all(140 < counts[ord(letter)] < 260 for letter in "abcdefghij")


def test_a_place_in_a_row_is_as_likely_as_the_row_is_long(tmp_path: Path) -> None:
    """A short row after a long one is not what a place in the long one leads to."""
    file = tmp_path / "a.jsonl"
    rows = [{"text": "a" * 900}, {"text": "b" * 100}] * 20
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = calibration_blocks(file, characters(), samples=400, length=1)
    share = (blocks == ord("b")).double().mean()
    assert 0.04 < share < 0.2


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl.gz", "a.txt"])
def test_memory_does_not_grow_with_the_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateurs.text.lines.CHARACTERS", 4096)
    monkeypatch.setattr("secateurs.text.formats.CHARACTERS", 4096)
    tokenizer = characters()
    peaks: list[int] = []
    for copies in (5, 25):
        source = write(tmp_path / str(copies) / name, WORDS * copies)
        tracemalloc.start()
        calibration_blocks(source, tokenizer, samples=2, length=20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_too_little_for_one_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is too short for samples of 30000 tokens"):
        calibration_blocks(write(tmp_path / "a.jsonl.gz"), characters(), samples=2, length=30_000)
    with pytest.raises(ValueError, match="is too short for samples of 30000 tokens"):
        calibration_blocks(write(tmp_path / "a.txt"), characters(), samples=2, length=30_000)


def test_bytes_that_are_no_text_are_named_where_they_are_met(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"fine \n" * 200 + b"\xff" + b"fine \n" * 2000)
    with pytest.raises(ValueError, match=r"a.txt' is not UTF-8 text \(byte 0xff in line 201\)"):
        calibration_blocks(file, characters(), samples=2, length=20)


def test_characters_of_several_bytes_are_never_cut(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("日本é🙂" * 500, encoding="utf-8")
    calibration_blocks(file, characters(), samples=100, length=20)


def test_conversations_are_drawn_as_the_template_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"question": f"{number}+1?", "answer": str(number + 1)} for number in range(300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = characters(begin=True)
    whole = load_text(file, tokenizer=tokenizer).joined
    assert whole.startswith("<s>User: 0+1?\nAssistant: 1</s><s>User: 1+1?")
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    for block in calibration_blocks(file, tokenizer, samples=20, length=60).tolist():
        assert any(expected[start : start + 60] == block for start in range(len(expected)))
