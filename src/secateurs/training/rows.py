"""Attention of sequences that stand in one row, one after another.

A mask of transformers' hides them from each other, but torch's kernels compute what is hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateurs.attention import OTHERWISE, as_sdpa


class _Block(NamedTuple):
    """Tokens of a row that see nothing but each other."""

    begin: int
    end: int
    causal: bool
    """Whether each sees all up to itself."""


class AttentionInBlocks:
    """Attention where a mask has blocks along its diagonal, one after another; any other as ever.

    Args:
        attend: transformers' function, or what stands in its place.

    Attributes:
        rows: calls with sequences that were attended to one by one.
        wholes: calls with one row in which nothing told sequences apart.
    """

    def __init__(self, attend: Callable[..., Any]) -> None:
        self.attend = attend
        self.rows = self.wholes = 0
        self._known = WeakIdKeyDictionary()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """See `secateurs.attention.grouped_attention`."""
        blocks = self._blocks(query, key, attention_mask)
        asked = (more.get(name) for name in OTHERWISE if name != "dropout")
        if not blocks or any(isinstance(each, Tensor) or each for each in asked):
            self.wholes += len(query) == 1
            found: tuple[Tensor, None] = self.attend(module, query, key, value, attention_mask, **more)
            return found
        self.rows += 1
        parts = []
        for begin, end, causal in blocks:
            of_block = (states[:, :, begin:end] for states in (query, key, value))
            mask = None if causal or attention_mask is None else attention_mask[..., begin:end, begin:end]
            told = {**more, "is_causal": True} if causal else more
            parts.append(self.attend(module, *of_block, mask, **told)[0])
        return torch.cat(parts, dim=1), None

    def _blocks(self, query: Tensor, key: Tensor, mask: Tensor | None) -> list[_Block]:
        """Those of a mask (1, 1, tokens, tokens); none if it has none, or is another."""
        tokens = query.shape[2]
        if mask is None or mask.dtype != torch.bool or mask.shape != (1, 1, tokens, tokens):
            return []
        if len(query) != 1 or key.shape[2] != tokens:
            return []
        if mask not in self._known:
            self._known[mask] = _blocks_of(mask[0, 0])
        blocks: list[_Block] = self._known[mask]
        return blocks


def _blocks_of(mask: Tensor) -> list[_Block]:
    """Of (tokens, tokens): a block begins where a token does not see the one before it."""
    begins = [0, *(~mask.diagonal(-1)).nonzero().flatten().add(1).tolist()]
    ends = [*begins[1:], len(mask)]
    parts = [mask[begin:end, begin:end] for begin, end in zip(begins, ends, strict=True)]
    if len(parts) == 1 or sum(int(part.count_nonzero()) for part in parts) != int(mask.count_nonzero()):
        return []
    causal = [torch.equal(part, torch.ones_like(part).tril()) for part in parts]
    return list(map(_Block, begins, ends, causal))


@contextmanager
def attention_in_blocks() -> Iterator[AttentionInBlocks]:
    """Models of transformers' own that attend by torch's kernels do it so until the context is left."""
    attention = AttentionInBlocks(ALL_ATTENTION_FUNCTIONS["sdpa"])
    with as_sdpa(attention):
        yield attention
