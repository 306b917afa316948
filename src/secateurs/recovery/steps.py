"""Steps towards a dense model's predictions, and how far they got."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from secateurs.anatomy import UnsupportedArchitectureError
from secateurs.anatomy.blocks import blocks_of
from secateurs.blockwise import states_in
from secateurs.recovery.loss import divergence, states_error

STATES = 4.0
"""Weight of the error of what blocks give, beside the divergence of the predictions."""

NOISE = ("dropout", "layerdrop", "layer_drop", "drop_prob", "drop_path", "jitter")
"""Parts of the names that transformers' models give to what they do at random in training."""

ALIKE = 32
"""Tokens that two sequences have in common only where they are from the same place of a text."""


class Recovery(Trainer):
    """A Trainer whose loss is the divergence of a model from another, in predictions and, in training, in
    what blocks give.

    Args:
        dense: the other, where the steps are made.
        text: weight of the text's own loss.
        blocks: of the model and of the other, whose results are to be alike.
        parts: Trainer's own.
    """

    def __init__(
        self, *, dense: PreTrainedModel, text: float, blocks: Sequence[nn.ModuleList], **parts: Any
    ) -> None:
        super().__init__(**parts)
        self.dense, self.text, self.blocks = dense, text, blocks
        self.model_accepts_loss_kwargs = False  # a batch's loss is a mean, and batches are of one size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean over all positions of a batch of sequences without padding."""
        blocks = self.blocks if model.training and self.text < 1 else ()
        with results_of(blocks) as results:
            loss = divergence_from(self.dense, model, inputs["input_ids"], self.text)
        if blocks:
            error = (1 - self.text) * STATES * states_error(*results)
            # Its gradient, without its value: what is logged is what the model is judged by.
            loss = loss + (error - error.detach())
        return (loss, {}) if return_outputs else loss


def blocks_alike(model: PreTrainedModel, dense: PreTrainedModel) -> list[nn.ModuleList]:
    """The blocks of both, where those of one are to give what those of the other do; else none.

    That is where one was made of the other, which the embedding tells: models that were trained apart hold
    the same in other directions.
    """
    models: tuple[Any, Any] = model, dense
    try:
        found = [blocks_of(one)[1] for one in models]
    except UnsupportedArchitectureError:
        return []
    shapes = {
        (type(one), len(blocks), one.config.get_text_config(decoder=True).hidden_size)
        for one, blocks in zip(models, found, strict=True)
    }
    own, other = (one.get_input_embeddings().weight.detach().float().cpu() for one in models)
    related = own.shape == other.shape and (own - other).norm() < 0.5 * other.norm()
    return found if len(shapes) == 1 and related else []


@contextmanager
def results_of(stacks: Sequence[nn.ModuleList]) -> Iterator[list[list[Tensor]]]:
    """The hidden states that the blocks of each stack give, block by block, until the context is left."""
    results: list[list[Tensor]] = [[] for _ in stacks]
    hooks = [
        block.register_forward_hook(lambda _module, _given, result, to=to: to.append(states_in(result)))
        for blocks, to in zip(stacks, results, strict=True)
        for block in dict.fromkeys(blocks)
    ]
    try:
        yield results
    finally:
        for hook in hooks:
            hook.remove()


def divergence_from(dense: nn.Module, model: nn.Module, ids: Tensor, text: float) -> Tensor:
    """See `divergence`; the dense model runs in its own dtype."""
    with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
        wanted = dense(input_ids=ids, use_cache=False).logits
    return divergence(model(input_ids=ids, use_cache=False).logits, wanted, ids, text=text)


@torch.no_grad()
def held_out_loss(
    dense: nn.Module, model: nn.Module, tokens: Tensor, arguments: TrainingArguments, text: float
) -> float:
    """What the model is judged by, on (sequences, length) tokens, in the arithmetic of training's steps."""
    model.eval()
    total = 0.0
    for ids in tokens.split(arguments.per_device_train_batch_size):
        ids = ids.to(arguments.device)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=arguments.bf16):
            total += len(ids) * divergence_from(dense, model, ids, text).item()
    return total / len(tokens)


def without_noise(model: nn.Module) -> None:
    """Dropout, layers left out and jitter of routers have no place in a comparison with a model that runs
    without. Some of a model reads them from its configuration at each call."""
    configurations = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    for owner in (*model.modules(), *configurations.values()):
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
        for name, value in vars(owner).items():
            if isinstance(value, float) and any(part in name for part in NOISE):
                setattr(owner, name, 0.0)


def hold_out(tokens: Tensor, count: int, seed: int, written: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sequences to train on, and others that have no place of the text in common with them.

    Args:
        tokens: (sequences, length), places of which may overlap.
        count: how many to hold out.
        seed: of which.
        written: (sequences,) bool, which of them are of no text: a model wrote each by itself, so that what
            they have in common, as the head of a chat template, does not count.

    Returns:
        What is left, and what is held out, (count, length).

    Raises:
        ValueError: nothing is left.
    """
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    held, rest = tokens[order[:count]], tokens[order[count:]]
    window = min(ALIKE, tokens.shape[1])
    apart = ~torch.isin(_hashes(rest, window), _hashes(held, window)).any(dim=1)
    rest = rest[apart if written is None else apart | written[order[count:]]]
    if not len(rest):
        raise ValueError(
            f"the text is too short to hold some of it out: give more, or shorter sequences than "
            f"{tokens.shape[1]} tokens"
        )
    return rest, held


def _hashes(tokens: Tensor, window: int) -> Tensor:
    """Of every run of so many tokens of each sequence."""
    powers = torch.tensor([pow(1_000_003, i, 2**61 - 1) for i in range(window)])
    return (tokens.unfold(1, window, 1) * powers).sum(dim=-1)


def in_order(tokens: Tensor, rows: int, seed: int) -> list[dict[str, Tensor]]:
    """So many rows for Trainer: pass after pass over the sequences, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(rows / len(tokens))
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(passes)])
    return rows_of(tokens[order[:rows]])


def rows_of(tokens: Tensor) -> list[dict[str, Tensor]]:
    """Sequences as Trainer takes them."""
    return [{"input_ids": row, "labels": row} for row in tokens]
