"""A tokenizer that a test can check by eye: one token per character, its id the character's code."""

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BEGIN = 1


def characters(*, begin: bool = False, window: int = 16) -> PreTrainedTokenizerFast:
    """Ids below 128; `begin` opens texts with the token BEGIN; one longer than `window` makes it warn."""
    vocabulary = {"<pad>": 0, "<s>": BEGIN, "</s>": 2, "?": ord("?")}
    vocabulary.update((chr(code), code) for code in range(3, 127))
    backend = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    if begin:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=window,
    )
