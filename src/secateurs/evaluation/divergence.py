"""How far a model's predictions are from those of the model that it was made from."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateurs.evaluation.perplexity import CHUNK
from secateurs.text import check_tokens


@torch.inference_mode()
def divergence(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokens: Tensor,
    *,
    length: int,
    windows: int | None = None,
    bos: int | None = None,
) -> float:
    """KL(dense || pruned) of what two models predict on a text, in nats per token.

    The tokens are cut into windows that do not overlap, what is left over at the end is dropped; a window's
    last position, which predicts what is not in it, does not count. Unlike perplexity it does not reward a
    model for being less sure where the dense one was too sure (see docs/pruning.md).

    Args:
        dense: the reference; runs where it is.
        pruned: the same vocabulary.
        tokens: (tokens,) int64 ids of the text.
        length: tokens of the text in a window.
        windows: how many of them to take, the first ones; None takes all.
        bos: a beginning-of-text token that every window begins with, before `length` tokens of the text.

    Raises:
        ValueError: the text is shorter than one window, or a token is none of the model's.
        FloatingPointError: a prediction is NaN or infinite.
    """
    if length < 2 or len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens, one window needs {max(2, length)}")
    check_tokens(tokens, dense.config.get_text_config(decoder=True).vocab_size)
    blocks = tokens[: len(tokens) // length * length].view(-1, length)[:windows]
    if bos is not None:
        blocks = torch.cat([torch.full_like(blocks[:, :1], bos), blocks], dim=1)
    total = 0.0
    for number, block in enumerate(blocks):
        wanted, given = (
            model(input_ids=block[None].to(model.device), use_cache=False).logits[0, :-1]
            for model in (dense, pruned)
        )  # (length - 1, vocabulary)
        found = sum(
            _divergence(ours, theirs.to(ours.device))
            for ours, theirs in zip(wanted.split(CHUNK), given.split(CHUNK), strict=True)
        ) / len(wanted)
        if not math.isfinite(found):
            raise FloatingPointError(f"the divergence in window {number} is not finite")
        total += found
    return total / len(blocks)


def _divergence(wanted: Tensor, given: Tensor) -> float:
    """Of logits (positions, vocabulary), summed over positions."""
    wanted, given = (logits.float().log_softmax(dim=-1) for logits in (wanted, given))
    return float((wanted.exp() * (wanted - given)).sum(dim=-1).sum())
