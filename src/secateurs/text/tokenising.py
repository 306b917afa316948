"""Tokens of a whole text without the memory that a tokenizer takes for a long one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Characters that are tokenised at once: a tokenizer takes some 700 bytes a token for its account of them.
CHUNK = 1 << 18
# Of which so many are seen by two chunks that follow one another, ...
OVERLAP = 4096
# ... which are joined where they agree on so many tokens before the seam and after it.
AGREE = 8


def tokenise(
    pieces: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rendered: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """The tokens that the tokenizer makes of a text whole, without the memory that it takes for that.

    Chunks of the text overlap, and are joined at a place where both have a token begin and have the same
    tokens around it. Should there be none, the chunks are tokenised as one.

    Args:
        pieces: the text, cut anywhere.
        tokenizer: makes the tokens.
        rendered: the special tokens are in the text: none is to be added.
        advance: is told of characters as they are done.

    Returns:
        (tokens,) int64 token ids on the CPU.
    """
    chunks = chunked(pieces, OVERLAP)
    chunk = next(chunks, "")
    following = next(chunks, None)
    if following is None:
        return torch.tensor(ids_of(chunk, tokenizer, rendered=rendered), dtype=torch.int64)
    if not tokenizer.is_fast:  # knows no places of its tokens
        whole = "".join(_without_overlap(chain([chunk, following], chunks)))
        return torch.tensor(ids_of(whole, tokenizer, rendered=rendered), dtype=torch.int64)

    front, back = ([], []) if rendered else _added(tokenizer)
    found = [numpy.array(front, dtype=numpy.int32)]
    account = account_of(chunk, tokenizer)
    first = 0  # the first of this chunk's tokens that counts
    for chunk_after in chain([following], chunks):
        after = account_of(chunk_after, tokenizer)
        seam = _seam(account, len(chunk) - OVERLAP, after)
        if seam is None or seam[0] < first:
            chunk += chunk_after[OVERLAP:]
            account = account_of(chunk, tokenizer)
            continue
        found.append(numpy.array(account.ids[first : seam[0]], dtype=numpy.int32))
        if advance:
            advance(len(chunk))
        chunk, account, first = chunk_after, after, seam[1]
    found.append(numpy.array([*account.ids[first:], *back], dtype=numpy.int32))
    return torch.from_numpy(numpy.concatenate(found)).to(torch.int64)


@contextmanager
def reading(shown: bool) -> Iterator[Callable[[int], None]]:
    """A line on standard error that counts characters of text, as it is told how many more were read."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("reading text: {task.completed:,.0f} characters"),
        TimeElapsedColumn(),
    )
    line = Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)
    task = line.add_task("", total=None)

    def advance(characters: int) -> None:
        line.start()  # at the first of many: what is read at once is not worth a line
        line.update(task, advance=characters)

    try:
        yield advance
    finally:
        if line.live.is_started:
            line.stop()


def chunked(pieces: Iterable[str], overlap: int) -> Iterator[str]:
    """Chunks of at least CHUNK characters, each but the first with the end of the one before."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        while size >= 2 * CHUNK:
            text = "".join(held)
            yield text[:CHUNK]
            held = [text[CHUNK - overlap :]]
            size = len(held[0])
    yield "".join(held)


def _without_overlap(chunks: Iterator[str]) -> Iterator[str]:
    yield next(chunks)
    for chunk in chunks:
        yield chunk[OVERLAP:]


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase, *, rendered: bool = False) -> list[int]:
    """A text's tokens, with those that the tokenizer adds unless a template has written them."""
    # Not verbose: it would warn that the text is longer than the model's window.
    ids: list[int] = tokenizer(text, verbose=False, add_special_tokens=not rendered)["input_ids"]
    return ids


def account_of(text: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The ids and offsets (`tokenizers.Encoding`) of a text without special tokens around it."""
    return tokenizer(text, verbose=False, add_special_tokens=False).encodings[0]


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer adds before a text and after it."""
    bare = ids_of("a", tokenizer, rendered=True)
    framed = ids_of("a", tokenizer, rendered=False)
    for front in range(len(framed) - len(bare) + 1):
        if framed[front : front + len(bare)] == bare:
            return framed[:front], framed[front + len(bare) :]
    raise AssertionError(f"{bare} is not in {framed}")


def _seam(before: Any, shift: int, after: Any) -> tuple[int, int] | None:
    """The tokens of two overlapping chunks from which on the second's are the first's, far from both ends.

    Args:
        before: an account.
        shift: where in its text that of the second begins.
        after: the second account.
    """
    begins = {place: token for token, (place, _) in reversed(list(enumerate(after.offsets[:OVERLAP])))}
    ids_before, ids = before.ids, after.ids
    for distance in range(OVERLAP // 4):
        for place in {OVERLAP // 2 - distance, OVERLAP // 2 + distance}:
            other = begins.get(place)
            token = before.char_to_token(shift + place) if other is not None else None
            if token is None or other is None or before.token_to_chars(token)[0] != shift + place:
                continue
            around = ids_before[token - AGREE : token + AGREE]
            if len(around) == 2 * AGREE and around == ids[max(other - AGREE, 0) : other + AGREE]:
                return token, other
    return None
