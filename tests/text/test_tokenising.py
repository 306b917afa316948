"""Tokens of chunks, joined, are those of the tokenizer itself on the whole text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import secateurs.demo
from secateurs.text import load_tokenizer, tokenising
from secateurs.text.tokenising import tokenise

DEMO = Path(secateurs.demo.__file__).parent
TEXT = (DEMO / "held_out.txt").read_text(encoding="utf-8")[:60_000]


def made(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of the kind of some family, that puts tokens before and behind a text."""
    special = ["<unk>", "<s>", "</s>"]
    backend: Tokenizer
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer, backend.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:  # as Llama 2: spaces are letters, and the whole text is one word
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator([TEXT[:20_000]], trainer)
    if kind == "bpe":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("kind", ["demo", "bpe", "unigram", "wordpiece"])
def test_the_joined_chunks_are_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(DEMO / "model") if kind == "demo" else made(kind)
    monkeypatch.setattr(tokenising, "CHUNK", 9000)
    pieces = [TEXT[start : start + 777] for start in range(0, len(TEXT), 777)]
    assert tokenise(pieces, tokenizer).tolist() == tokenizer(TEXT, verbose=False)["input_ids"]
    bare = tokenizer(TEXT, verbose=False, add_special_tokens=False)["input_ids"]
    assert tokenise(pieces, tokenizer, rendered=True).tolist() == bare


PARTS = ["word ", "  ", "<|endoftext|>"]
TOKENIZER = load_tokenizer(DEMO / "model")


@settings(max_examples=60)
@given(
    text=st.lists(
        st.text(" \n\taé日🙂x") | st.sampled_from(["word ", "  ", "<|endoftext|>"]), max_size=60
    ).map("".join),
    chunk=st.integers(60, 120),
    cut=st.integers(1, 50),
)
def test_any_text_and_any_chunks(text: str, chunk: int, cut: int) -> None:
    """Runs of spaces and of characters of several bytes, which few places are fit to be cut at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenising, "CHUNK", chunk)
        patch.setattr(tokenising, "OVERLAP", 48)
        pieces = [text[start : start + cut] for start in range(0, len(text), cut)]
        assert tokenise(pieces, TOKENIZER).tolist() == TOKENIZER(text)["input_ids"]
