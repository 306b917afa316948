"""Attention of a new token to those before it.

Where several heads share keys and values, torch's kernel for processors goes through the heads one by one,
each as a product with one row. As rows of one product, the queries of a group take a fraction of that time.
And transformers' cache copies all keys and values with every token; here there is room for all from the
first.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

OTHERWISE = ("dropout", "softcap", "position_bias", "cache")
"""What transformers' own function may be asked for, and has to answer."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa_attention_forward` computes.

    Scores of one token are rounded to the dtype of its query, as transformers' eager attention rounds them.

    Args:
        module: the attention layer.
        query: (batch, heads, tokens, head size).
        key: (batch, heads with keys, tokens so far, head size).
        value: likewise.
        attention_mask: (batch, 1 or heads, tokens, tokens so far), or None where all are seen.
        scaling: of the products.
        more: of transformers' own.

    Returns:
        (batch, tokens, heads, head size), and nothing.
    """
    batch, heads, tokens, size = query.shape
    shared = key.shape[1]
    one_by_one = query.is_cpu and tokens == 1 and shared < heads and attention_mask is None
    asked = (more.get(name) for name in OTHERWISE)
    if not one_by_one or any(isinstance(each, Tensor) or each for each in asked):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    # Scaled before they are summed: float16 would not hold the sums.
    scaled = query * (size**-0.5 if scaling is None else scaling)
    scores = (key @ scaled.reshape(batch, shared, heads // shared, size).mT).mT
    output = scores.float().softmax(dim=-1).to(value.dtype) @ value
    return output.reshape(batch, 1, heads, -1), None


def _growing(length: int) -> Any:
    """A method that updates a layer's cache in place, with room for so many tokens, or more if need be."""

    def update(
        layer: DynamicLayer, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        layer.keys = _appended(layer, layer.keys, key_states, length)
        layer.values = _appended(layer, layer.values, value_states, length)
        return layer.keys, layer.values

    return update


def _appended(layer: DynamicLayer, held: Tensor | None, new: Tensor, length: int) -> Tensor:
    """States (batch, heads, tokens, size) with those of more tokens behind them.

    A view of memory that has room for `length` tokens, if there are no more, and belongs to one layer.
    """
    before = 0 if held is None or not held.numel() else held.shape[-2]
    tokens = before + new.shape[-2]
    owner, room = getattr(held, "room", (None, new))
    if owner is None or owner() is not layer or tokens > room.shape[-2]:
        room = new.new_empty(*new.shape[:-2], max(length, tokens), new.shape[-1])
        if held is not None and before:
            room[..., :before, :] = held
    room[..., before:tokens, :] = new
    states: Any = room[..., :tokens, :]
    # Not on the layer: whatever else makes new states of these (another order of the batch) leaves it behind.
    states.room = weakref.ref(layer), room
    return states


@contextmanager
def token_by_token(length: int) -> Iterator[None]:
    """Models of transformers' own attend and keep states in this way until the context is left.

    Attention by torch's kernels (sdpa) is replaced under its own name, as some models look at that.

    Args:
        length: tokens that there will be.
    """
    layers: Any = DynamicLayer
    update = layers.update
    layers.update = _growing(length)
    try:
        with as_sdpa(grouped_attention):
            yield
    finally:
        layers.update = update


@contextmanager
def as_sdpa(attention: Callable[..., Any]) -> Iterator[None]:
    """Within, models of transformers' own that attend by torch's kernels do so by another function."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # what was set here; transformers' own comes forth again
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not before:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = before
