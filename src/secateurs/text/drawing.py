"""Blocks of tokens from a text that is too large to be tokenised whole: places first, tokens only there."""

from collections.abc import Callable, Iterable, Iterator
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateurs.text.documents import Files, Text, joined
from secateurs.text.tokenising import AGREE, account_of, chunked, ids_of, reading

# Characters before a place that are tokenised with it: a word that is cut there has other tokens.
LEAD = 128
# A block's tokens take about four characters each, of code up to ten; where they take more, more are read.
CHARACTERS_PER_TOKEN = 12
# Places that are drawn in vain, so near the end that no block fits, before a text counts as too short.
PATIENCE = 100


def drawn_blocks(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    random: Random,
    *,
    progress: bool = False,
) -> list[Tensor]:
    """As many blocks (length,) of int64 token ids as were asked for, or fewer if the text is too short.

    Where a place can be gone to, only what stands there is read; else the text is read once, and each
    character of it is as likely to be a place as any other.
    """
    assert text.separator is not None
    with reading(progress) as advance:
        if isinstance(text.documents, Files) and text.documents.can_seek:
            texts = _sought(text.documents, text.separator, random)
        else:
            size = LEAD + CHARACTERS_PER_TOKEN * length
            watched = _watched(text.pieces(), advance)
            texts = ([drawn] for drawn in _streamed(watched, samples + samples // 8 + 8, size, random))
        blocks: list[Tensor] = []
        failed = 0
        for pieces in texts:
            ids = _first_tokens(iter(pieces), tokenizer, length)
            if ids is None:
                failed += 1
            else:
                blocks.append(torch.tensor(ids, dtype=torch.int64))
            if len(blocks) == samples or failed == PATIENCE:
                break
    return blocks


def _watched(pieces: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    for piece in pieces:
        yield piece
        advance(len(piece))


def _sought(files: Files, separator: str, random: Random) -> Iterator[Iterable[str]]:
    """The text from random places on, to its end; as many as are asked for."""
    sizes = [file.stat().st_size for file in files.files]
    while True:
        place = random.random() * sum(sizes)
        for file, size in zip(files.files, sizes, strict=True):
            if place < size:
                yield joined(files.parts_from(file, place / size), separator)
                break
            place -= size


def _streamed(pieces: Iterable[str], count: int, size: int, random: Random) -> list[str]:
    """So many texts of a size (those at the end are shorter), each from a place drawn among all characters.

    Each is a reservoir of one: of all that has been read, any character is as likely to be its first.
    """
    drawn = [""] * count
    read = 0
    for chunk in chunked(pieces, overlap=0):
        read += len(chunk)
        for slot, text in enumerate(drawn):
            if random.random() * read < len(chunk):
                place = random.randrange(len(chunk))
                drawn[slot] = chunk[place : place + size]
            elif len(text) < size:
                drawn[slot] = text + chunk[: size - len(text)]
    return drawn


def _first_tokens(pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[int] | None:
    """The first tokens that begin after LEAD characters; None if the text ends before there are enough."""
    text, size, more = "", LEAD + CHARACTERS_PER_TOKEN * length // 2, True
    while True:
        while more and len(text) < size:
            piece = next(pieces, None)
            more, text = piece is not None, text + (piece or "")
        whole = not more and len(text) <= size
        ids = _tokens_after_lead(text[:size], tokenizer)
        # What a cut text ends with would have other tokens if it went on.
        if len(ids) >= length + (0 if whole else AGREE):
            return ids[:length]
        if whole:
            return None
        size *= 2


def _tokens_after_lead(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.is_fast:  # knows no places of its tokens
        return ids_of(text[LEAD:], tokenizer, rendered=True)
    account = account_of(text, tokenizer)
    first = next((token for token, (place, _) in enumerate(account.offsets) if place >= LEAD), None)
    return [] if first is None else list(account.ids[first:])
