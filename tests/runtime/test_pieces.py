"""Generated text in pieces: together what decoding all tokens at once gives, whatever the tokenizer."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateurs.runtime.generate import pieces

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["▁", "▁My", "▁friend", "▁re", "cheart", "▁.", "▁n", "'t", ".", "é", "▁€", "a", "e"]
END = 2


def metaspace(*, clean: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2 has it: a space is a letter, what is not in the vocabulary is bytes."""
    vocabulary = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=clean,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=clean,
    )


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and Llama 3 have it: characters of several bytes are cut anywhere."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL, *letters, "Ġthe", "Ã©", "âĤ", "ðŁĻ"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "metaspace": metaspace(),
    "metaspace, cleaned up": metaspace(clean=True),
    "byte level": byte_level(),
}


def streamed(tokenizer: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> list[str]:
    def endless() -> Iterator[int]:
        yield from new
        raise AssertionError("asked for more tokens than wanted")

    return list(pieces(prompt, endless(), len(new), {END}, tokenizer))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_are_what_decoding_at_once_gives(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    rare = st.integers(0, len(tokenizer) - 1)
    often = st.integers(len(tokenizer) - len(WORDS), len(tokenizer) - 1)
    euro = st.sampled_from([3 + byte for byte in "€".encode()]) if name != "byte level" else rare
    token = st.one_of(rare, often, euro)
    # A prompt is a text, and so ends with a whole character.
    prompt = [1, *tokenizer.convert_tokens_to_ids(data.draw(st.sampled_from([["a"], ["a", "e", "a"]])))]
    new = data.draw(st.lists(token.filter(lambda t: t != END), min_size=1, max_size=12))
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(prompt + new, skip_special_tokens=True)
    assert before + "".join(streamed(tokenizer, prompt, new)) == whole


def test_the_space_before_the_first_word_is_kept() -> None:
    tokenizer = metaspace()
    prompt, new = (
        tokenizer.convert_tokens_to_ids(words) for words in (["▁My", "▁friend"], ["▁re", "cheart"])
    )
    assert streamed(tokenizer, [1, *prompt], new) == [" re", "cheart"]


def test_the_end_of_a_text_ends_it() -> None:
    tokenizer = metaspace()
    a = tokenizer.convert_tokens_to_ids("a")
    assert list(pieces([a], iter([a, END, a]), 10, {END}, tokenizer)) == ["a"]


def test_a_character_comes_when_its_last_byte_does() -> None:
    tokenizer = byte_level()
    euro = tokenizer.convert_tokens_to_ids(["âĤ", "¬"])
    a = tokenizer.convert_tokens_to_ids("a")
    assert streamed(tokenizer, [a], [*euro, a]) == ["€", "a"]
