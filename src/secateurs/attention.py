"""Attention of a new token to those before it, on processors.

Where several heads share keys and values, torch's kernel there goes through the heads one by one, each as a
product with one row. As rows of one product, the queries of a group take a fraction of that time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
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
    rows = query.reshape(batch, shared, heads // shared, size)
    output = functional.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return output.reshape(batch, 1, heads, -1), None


@contextmanager
def grouped() -> Iterator[None]:
    """Models that attend by torch's kernels (sdpa) do so in this way until the context is left.

    Under its own name, as some look at that.
    """
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped_attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before
