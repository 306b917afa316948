import json
import logging
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from characters import BEGIN, characters
from secateurs.text import calibration_blocks, evaluation_tokens, load_tokenizer, tokens, wants_bos

WORDS = " ".join(str(number) for number in range(500))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "words.txt"
    file.write_text(WORDS)
    return file


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.mark.parametrize("seed", [0, 7])
def test_blocks_are_those_of_the_published_stream(text: Path, seed: int) -> None:
    state = random.getstate(), torch.get_rng_state()
    blocks = calibration_blocks(text, characters(), samples=5, length=40, seed=seed)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])

    random.seed(seed)
    starts = [random.randint(0, len(WORDS) - 40 - 1) for _ in range(5)]
    random.setstate(state[0])
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [codes(WORDS[start : start + 40]) for start in starts]


def test_the_text_is_tokenised_once_and_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in ("first row", "second")))
    with caplog.at_level(logging.WARNING):
        ids = evaluation_tokens(file, characters(begin=True, window=4))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [BEGIN, *codes("first row\n\nsecond")]
    assert "longer than" not in caplog.text


def test_too_little_text_says_how_much_there_is(text: Path) -> None:
    count = len(WORDS)
    assert calibration_blocks(text, characters(), samples=1, length=count - 1).tolist() == [codes(WORDS[:-1])]
    with pytest.raises(
        ValueError, match=rf"words.txt' has {count} tokens, 1 samples of {count} need {count + 1}:"
    ):
        calibration_blocks(text, characters(), samples=1, length=count)
    with pytest.raises(ValueError, match=rf"has {count} tokens, 64 samples of 32 need 2049: give more text"):
        calibration_blocks(text, characters(), samples=64, length=32)
    with pytest.raises(ValueError, match="both must be at least 1"):
        calibration_blocks(text, characters(), samples=0)


def test_every_block_can_begin_with_a_token_of_beginning(text: Path) -> None:
    """Otherwise the blocks are those of one token less, also if the tokenizer puts one at the front."""
    plain = calibration_blocks(text, characters(), samples=9, length=20, seed=5)
    for begin in (False, True):
        blocks = calibration_blocks(text, characters(begin=begin), samples=9, length=21, seed=5, bos=True)
        assert blocks[:, 0].tolist() == [BEGIN] * 9
        assert torch.equal(blocks[:, 1:], plain)
    tokenizer = characters()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no beginning-of-text token"):
        calibration_blocks(text, tokenizer, samples=1, length=20, bos=True)


def test_gemma_wants_a_token_of_beginning() -> None:
    kinds = {"gemma": True, "gemma2": True, "gemma3_text": True, "llama": False, "qwen3": False}
    assert {kind: wants_bos(kind) for kind in kinds} == kinds
    assert wants_bos("llama", True)
    assert not wants_bos("gemma2", False)


def serve(monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> None:
    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": documents})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_blocks_of_c4_lie_within_long_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [chr(65 + number) * (5 * number) + "!" * number for number in range(12)]
    serve(monkeypatch, documents)
    blocks = calibration_blocks("c4", characters(), samples=20, length=30, seed=3)

    drawn, expected = random.Random(3), []
    while len(expected) < 20:
        document = documents[drawn.randint(0, len(documents) - 1)]
        if len(document) > 30:
            start = drawn.randint(0, len(document) - 30 - 1)
            expected.append(codes(document[start : start + 30]))
    assert blocks.tolist() == expected


def test_c4_without_a_document_of_the_length_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, ["short", "brief"])
    monkeypatch.setattr(tokens, "PATIENCE", 5)
    with pytest.raises(ValueError, match="of 5 random documents none is longer than 30 tokens"):
        calibration_blocks("c4", characters(), samples=1, length=30)


def test_c4_is_cut_for_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, ["one", "two", "three"])
    monkeypatch.setattr(tokens, "C4_TOKENS", 9)
    assert evaluation_tokens("c4", characters()).tolist() == codes("one two t")


def test_a_tokenizer_comes_back_from_its_folder(tmp_path: Path) -> None:
    characters(begin=True).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a b")["input_ids"] == [BEGIN, *codes("a b")]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    # With no more than this, transformers hands out a GPT-2 tokenizer that turns any text into nothing.
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{}", "{{", ""])
def test_a_broken_tokenizer_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
