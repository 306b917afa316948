"""Blocks of tokens to calibrate on, one long row of tokens to evaluate on.

As in SparseGPT and Wanda a text is tokenised whole, so a tokenizer that opens with a beginning-of-sequence
token puts one at its front only, and blocks start at random places in it. Of a text too large for that only
what is drawn is tokenised.
"""

from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from secateurs.text.documents import Files, Text
from secateurs.text.drawing import drawn_blocks
from secateurs.text.hub import PUBLISHED
from secateurs.text.sources import WHOLE, load_text
from secateurs.text.tokenising import ids_of, reading, tokenise

# SparseGPT evaluates on as much of C4 as makes 256 windows of 2048 tokens.
C4_TOKENS = 256 * 2048
# About one document of C4 in forty is longer than 2048 tokens; after this many too short ones none will come.
PATIENCE = 20_000
# Without one of these transformers makes up a tokenizer of no words for many families, and does not say so.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


class TooShortError(ValueError):
    """A text has fewer tokens than were to be drawn."""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder; its code is never run if it brings some.

    Raises:
        ValueError: the folder holds none, or one that transformers cannot read.
    """
    if not any((Path(folder) / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"no tokenizer in '{folder}' (none of {', '.join(VOCABULARIES)})")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a broken file comes out as a KeyError, an OSError or the parser's own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the tokenizer in '{folder}' cannot be read ({reason})") from error


def wants_bos(model_type: str, asked: bool | None = None) -> bool:
    """Whether blocks and windows begin with the beginning-of-text token each: as asked, by default for Gemma.

    The published figures of other models are without (at most the text begins with one, where the tokenizer
    puts it there); Gemma has never seen a text without, and gemma-2b's perplexity is 650 instead of 21.
    """
    return model_type.startswith("gemma") if asked is None else asked


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's beginning-of-text token.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no beginning-of-text token to begin windows with")
    return int(tokenizer.bos_token_id)


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Raises ValueError if one of the tokens, of any shape, is none of a model's vocabulary."""
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"token {token} is outside of the model's vocabulary of {vocabulary}: "
                "the tokenizer is another model's"
            )


def calibration_blocks(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    field: str = "text",
    bos: bool | None = None,
    progress: bool = False,
) -> Tensor:
    """Random blocks of tokens from a text, or from conversations as the model's chat template writes them.

    The named data sets, and what has up to four million characters, are tokenised whole, and the places
    drawn as the published code of SparseGPT draws them after `random.seed(seed)`: with the same text and
    tokenizer the blocks are the same. Of a larger text the places are drawn first, from its bytes (parquet
    and Arrow: from their rows, and within a row from its characters); a block is the first `length` tokens
    from there on, and goes on into the documents that follow. Packed files, `.csv` and `.json`, in which one
    cannot go to a place, are read through once, and every character is as likely to be the place. Global
    random state is not touched.

    Args:
        source: see `load_text`. Of `c4` each block lies in one document that is longer than a block.
        tokenizer: makes the tokens, with its own defaults about special tokens.
        samples: blocks to draw.
        length: tokens in each.
        seed: of the places.
        field: see `load_text`.
        bos: begin each block with the beginning-of-text token, followed by one token of text less; see
            `wants_bos`. By default it is where the tokenizer puts it: at the front of the whole text.
        progress: show a progress line on standard error.

    Returns:
        (samples, length) int64 token ids on the CPU.

    Raises:
        ValueError: the text cannot be had (see `load_text`) or is too short for so many tokens, or the
            tokenizer has no beginning-of-text token.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"{samples} samples of {length} tokens: both must be at least 1")
    begin = [bos_id(tokenizer)] if bos else []
    of_text = length - len(begin)
    if of_text < 1:
        raise ValueError(f"samples of {length} tokens: with a beginning-of-text token at least 2")
    text = load_text(source, field=field, split="calibration", tokenizer=tokenizer)
    random = Random(seed)
    if text.separator is None:
        blocks = [_block_of_documents(text, tokenizer, of_text, random) for _ in range(samples)]
    elif source not in PUBLISHED and _is_large(text):
        blocks = drawn_blocks(text, tokenizer, samples, of_text, random, progress=progress)
        if len(blocks) < samples:
            raise TooShortError(
                f"'{source}' is too short for samples of {of_text} tokens: ask for shorter ones"
            )
    else:
        tokens = _tokenised(text, tokenizer, progress)
        if begin and tokens[:1].tolist() == begin:
            tokens = tokens[1:]
        needed = samples * of_text + 1
        if len(tokens) < needed:
            raise TooShortError(
                f"'{source}' has {len(tokens)} tokens, {samples} samples of {of_text} need {needed}: "
                "give more text, or ask for fewer or shorter samples"
            )
        blocks = [_block(tokens, of_text, random) for _ in range(samples)]
    return torch.stack([torch.cat([torch.tensor(begin, dtype=torch.int64), block]) for block in blocks])


def evaluation_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = "text",
    progress: bool = False,
) -> Tensor:
    """All tokens of a text, for `secateurs.evaluation.perplexity`.

    Args:
        source: see `load_text`. Of `c4` the first 1100 validation documents, cut to 524,288 tokens.
        tokenizer: makes the tokens, with its own defaults about special tokens; of conversations with those
            that the chat template writes.
        field: see `load_text`.
        progress: show a progress line on standard error.

    Returns:
        (tokens,) int64 token ids on the CPU.

    Raises:
        ValueError: the text cannot be had (see `load_text`).
    """
    text = load_text(source, field=field, split="evaluation", tokenizer=tokenizer)
    tokens = _tokenised(text, tokenizer, progress)
    return tokens[:C4_TOKENS] if source == "c4" else tokens


def _tokenised(text: Text, tokenizer: PreTrainedTokenizerBase, progress: bool) -> Tensor:
    with reading(progress) as advance:
        return tokenise(text.pieces(), tokenizer, rendered=text.rendered, advance=advance)


def _is_large(text: Text) -> bool:
    return isinstance(text.documents, Files) or sum(map(len, text.documents)) > WHOLE


def _block(tokens: Tensor, length: int, random: Random) -> Tensor:
    # Never the last place where a block would fit: so it is in the published code, and so its stream is met.
    start = random.randint(0, len(tokens) - length - 1)
    return tokens[start : start + length]


def _block_of_documents(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int, random: Random
) -> Tensor:
    documents: Any = text.documents
    for _ in range(PATIENCE):
        document = documents[random.randint(0, len(documents) - 1)]
        tokens = torch.tensor(ids_of(document, tokenizer, rendered=text.rendered), dtype=torch.int64)
        if len(tokens) > length:
            return _block(tokens, length, random)
    raise ValueError(
        f"of {PATIENCE} random documents none is longer than {length} tokens: ask for shorter samples"
    )
