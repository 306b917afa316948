"""How far a model's predictions are from those of the model that it was made from."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateurs.evaluation.perplexity import CHUNK, cut_windows


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

    The tokens are cut into windows as `secateurs.perplexity` cuts them; a window's last position, which
    predicts what is not in it, does not count. Unlike perplexity it does not reward a model for being less
    sure where the dense one was too sure (see docs/pruning.md).

    Args:
        dense: the reference; runs where it is. The training mode of both is restored afterwards.
        pruned: the same vocabulary.
        tokens: (tokens,) int64 ids of the text.
        length: tokens in a window.
        windows: how many of them to take, the first ones; None takes all.
        bos: a beginning-of-text token that every window begins with, followed by `length - 1` tokens of the
            text.

    Raises:
        ValueError: the text is shorter than one window, a window longer than the model's positions or shorter
            than two tokens, or a token is none of the model's.
        FloatingPointError: a prediction is NaN or infinite.
    """
    blocks = cut_windows(dense, tokens, length=length, bos=bos)[:windows]
    models = (dense, pruned)
    were_training = [model.training for model in models]
    total = 0.0
    try:
        for model in models:
            model.eval()
        for number, block in enumerate(blocks):
            wanted, given = (
                model(input_ids=block[None].to(model.device), use_cache=False).logits[0, :-1]
                for model in models
            )  # (length - 1, vocabulary)
            found = sum(
                float(divergences(ours, theirs.to(ours.device)).sum())
                for ours, theirs in zip(wanted.split(CHUNK), given.split(CHUNK), strict=True)
            ) / len(wanted)
            if not math.isfinite(found):
                raise FloatingPointError(f"the divergence in window {number} is not finite")
            total += found
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)
    return total / len(blocks)


def divergences(wanted: Tensor, given: Tensor) -> Tensor:
    """KL(wanted || given) of two models' logits (positions, vocabulary) at each position, in nats."""
    wanted, given = (logits.float().log_softmax(dim=-1) for logits in (wanted, given))
    return (wanted.exp() * (wanted - given)).sum(dim=-1)
