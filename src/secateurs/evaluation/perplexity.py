"""Perplexity as the SparseGPT line of papers computes it.

The tokens are cut into windows that do not overlap, what is left over at the end is dropped, and every window
counts alike: the exponential of the mean over windows of the mean loss of a window's tokens but the first
(https://github.com/IST-DASLab/sparsegpt/blob/master/llama.py, `llama_eval`).
"""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from secateurs import ranks
from secateurs.text import check_tokens

# Positions whose logits are in float32 at once: a quarter of a GB with a vocabulary of 256k.
CHUNK = 256


def default_length(decoder: PreTrainedConfig) -> int:
    """Tokens in a window where none are asked for: 2048, or as many as there are positions if fewer."""
    return min(getattr(decoder, "max_position_embeddings", None) or 2048, 2048)


def cut_windows(
    model: PreTrainedModel, tokens: Tensor, *, length: int | None = None, bos: int | None = None
) -> Tensor:
    """A text's tokens (tokens,) as a model is measured on them: (windows, length), each with its `bos`.

    Windows do not overlap; what is left over at the end is dropped. For the arguments and what is raised see
    `perplexity`.
    """
    config = model.config.get_text_config(decoder=True)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if length is None:
        length = default_length(config)
    if length < 2 or (positions and length > positions):
        raise ValueError(f"windows of {length} tokens: from 2 to {positions or 'any number'} suit this model")
    if bos is not None and tokens[:1].tolist() == [bos]:
        tokens = tokens[1:]  # the tokenizer put one at the front of the whole text
    of_text = length if bos is None else length - 1
    windows = len(tokens) // of_text
    if windows == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, one window needs {of_text}: give more, or shorter windows"
        )
    check_tokens(tokens, config.vocab_size)
    blocks = tokens[: windows * of_text].view(windows, of_text)
    return blocks if bos is None else torch.cat([torch.full_like(blocks[:, :1], bos), blocks], dim=1)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    length: int | None = None,
    batch_size: int | None = None,
    bos: int | None = None,
    progress: bool = False,
) -> float:
    """Perplexity of a causal language model on a text, whose windows ranks share (see `evaluate`).

    Args:
        model: runs where it is; its training mode is restored afterwards.
        tokens: (tokens,) int64 ids of the whole text, as `secateurs.text.evaluation_tokens` gives them. They
            may stay on the CPU: a batch at a time is moved.
        length: tokens in a window. None takes 2048, as the papers do, or as many as the model has positions
            if these are fewer.
        batch_size: windows run at once; None takes 4096 tokens' worth. The result does not depend on it
            beyond rounding.
        bos: a beginning-of-text token that every window begins with, followed by `length - 1` tokens of the
            text (see `secateurs.text.wants_bos` and `bos_id`). By default it is where the text has it.
        progress: show a progress bar on standard error.

    Returns:
        The perplexity.

    Raises:
        ValueError: the text is shorter than one window, a window longer than the model's positions or shorter
            than two tokens, or a token is none of the model's.
        FloatingPointError: the loss of a window is NaN or infinite.
    """
    from rich.console import Console
    from rich.progress import track

    blocks = cut_windows(model, tokens, length=length, bos=bos)
    windows, length = blocks.shape
    of_text = length if bos is None else length - 1
    batch_size = batch_size or max(1, 4096 // length)
    ranks.check_share(windows)
    own = ranks.share_of(torch.arange(windows))
    batches = blocks[own[0] : own[-1] + 1].split(batch_size)
    losses, done = torch.zeros(windows, dtype=torch.float64), int(own[0])
    was_training = model.training
    model.eval()
    try:
        for batch in track(
            batches, "perplexity", console=Console(stderr=True), disable=not progress, transient=True
        ):
            found = _losses(model, batch.to(model.device))
            losses[done : done + len(batch)] = found
            done += len(batch)
            if not found.isfinite().all():
                break
    finally:
        model.train(was_training)
    finite = ranks.summed(losses).isfinite()  # on all ranks alike
    if not finite.all():
        window = int(finite.int().argmin())
        first, last = window * of_text, (window + 1) * of_text - 1
        raise FloatingPointError(f"the loss of window {window} (tokens {first} to {last}) is not finite")
    return (losses.sum() / windows).exp().item()


def _losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean next-token loss of each window, ids (batch, length) -> (batch,) float64 on the CPU."""
    logits = model(input_ids=ids, use_cache=False).logits  # (batch, length, vocabulary)
    losses = [
        functional.cross_entropy(scores.float(), targets, reduction="none")
        for window, tokens in zip(logits, ids, strict=True)
        for scores, targets in zip(window[:-1].split(CHUNK), tokens[1:].split(CHUNK), strict=True)
    ]
    return torch.cat(losses).view(len(ids), -1).cpu().double().mean(dim=1)
