"""Blocks of tokens to calibrate on, one long row of tokens to evaluate on.

As in SparseGPT and Wanda a text is tokenised once and whole, so a tokenizer that opens with a
beginning-of-sequence token puts one at its front only, and blocks start at random places in it.
"""

from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from secateurs.text.sources import Text, load_text

# SparseGPT evaluates on as much of C4 as makes 256 windows of 2048 tokens.
C4_TOKENS = 256 * 2048
# About one document of C4 in forty is longer than 2048 tokens; after this many too short ones none will come.
PATIENCE = 20_000
# Without one of these transformers makes up a tokenizer of no words for many families, and does not say so.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


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


def calibration_blocks(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    field: str = "text",
) -> Tensor:
    """Random blocks of tokens from a text.

    The places are drawn as the published code of SparseGPT draws them after `random.seed(seed)`: with the
    same text and tokenizer the blocks are the same. Global random state is not touched.

    Args:
        source: see `load_text`. Of `c4` each block lies in one document that is longer than a block.
        tokenizer: makes the tokens, with its own defaults about special tokens.
        samples: blocks to draw.
        length: tokens in each.
        seed: of the places.
        field: see `load_text`.

    Returns:
        (samples, length) int64 token ids on the CPU.

    Raises:
        ValueError: the text cannot be had (see `load_text`) or is too short for so many tokens.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"{samples} samples of {length} tokens: both must be at least 1")
    text = load_text(source, field=field, split="calibration")
    random = Random(seed)
    if text.separator is None:
        blocks = [_block_of_documents(text, tokenizer, length, random) for _ in range(samples)]
    else:
        tokens = _tokenise(text.joined, tokenizer)
        needed = samples * length + 1
        if len(tokens) < needed:
            raise ValueError(
                f"'{source}' has {len(tokens)} tokens, {samples} samples of {length} need {needed}: "
                "give more text, or ask for fewer or shorter samples"
            )
        blocks = [_block(tokens, length, random) for _ in range(samples)]
    return torch.stack(blocks)


def evaluation_tokens(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, *, field: str = "text"
) -> Tensor:
    """All tokens of a text, for `secateurs.evaluate.perplexity`.

    Args:
        source: see `load_text`. Of `c4` the first 1100 validation documents, cut to 524,288 tokens.
        tokenizer: makes the tokens, with its own defaults about special tokens.
        field: see `load_text`.

    Returns:
        (tokens,) int64 token ids on the CPU.

    Raises:
        ValueError: the text cannot be had (see `load_text`).
    """
    tokens = _tokenise(load_text(source, field=field, split="evaluation").joined, tokenizer)
    return tokens[:C4_TOKENS] if source == "c4" else tokens


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # Not verbose: it would warn that the text is longer than the model's window.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _block(tokens: Tensor, length: int, random: Random) -> Tensor:
    # Never the last place where a block would fit: so it is in the published code, and so its stream is met.
    start = random.randint(0, len(tokens) - length - 1)
    return tokens[start : start + length]


def _block_of_documents(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int, random: Random
) -> Tensor:
    for _ in range(PATIENCE):
        document = text.documents[random.randint(0, len(text.documents) - 1)]
        tokens = _tokenise(document, tokenizer)
        if len(tokens) > length:
            return _block(tokens, length, random)
    raise ValueError(
        f"of {PATIENCE} random documents none is longer than {length} tokens: ask for shorter samples"
    )
