"""Attention of a new token to those before it, on processors.

Where several heads share keys and values, torch's kernel there goes through the heads one by one, each as a
product with one row. As rows of one product, the queries of a group take a fraction of that time: of SmolLM2,
32 sequences of 1000 tokens, a ninth.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "secateurs-grouped"


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
    if not one_by_one or any(more.get(name) for name in ("dropout", "cache")) or "position_bias" in more:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    rows = query.reshape(batch, shared, heads // shared, size)
    output = functional.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return output.reshape(batch, 1, heads, -1), None


ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend in this way, where it would by torch's kernels, until the context is left."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    own = {id(config): config for config in configs if isinstance(config, PretrainedConfig)}
    chosen = [config for config in own.values() if config._attn_implementation == "sdpa"]
    if not model._can_set_attn_implementation():
        chosen.clear()
    for config in chosen:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config in chosen:
            config._attn_implementation_internal = "sdpa"
