"""The loss of a training step from the positions that have labels alone, a few of them at a time.

In fine-tuning much of a conversation has no label, yet a model's own code makes logits of all of it; and with
a large vocabulary the logits, their exponentials and their gradient are by far the largest tensors of a step.
Here the head drops the other positions. On a CPU it goes further and leaves its product to the loss, where
torch's `linear_cross_entropy` makes the logits of a few positions at once and both gradients with them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from secateurs.training.omission import decoder_of, evaluating

CHUNK = 256
"""Positions at once. On a CPU fewer are slower, and more no faster (benchmarks/head.py)."""

IGNORED = -100
"""The label of a position that has none, in transformers."""

TOLERANCE = 1e-5
"""By how much, relatively, the proof's two losses may differ, where a dtype's own rounding is not coarser."""


@contextmanager
def logits_where_labels(model: nn.Module) -> Iterator[bool]:
    """Within, a model in training mode that is called with `labels` computes its own loss with less work.

    The `logits` beside it are those of labelled positions in one row, (1, labels, vocabulary), or of no width
    where none were kept. In evaluation mode, and without labels (label smoothing takes them away), the model
    is as ever. It is proved first, on a few tokens, that the loss is still the model's own; if not, or if the
    loss is not transformers' for decoders, nothing changes. Each loss has one backward pass.

    Args:
        model: a decoder whose parameters are whole, or its wrapping (DDP, PEFT). Not to be compiled: how many
            labels there are changes from batch to batch.

    Yields:
        Whether it does.
    """
    decoder: Any = decoder_of(model)
    head = decoder.get_output_embeddings()
    usual = isinstance(head, nn.Module) and "forward" not in vars(head)
    if not usual or decoder.loss_function is not ForCausalLMLoss:
        yield False
        return
    lean = _Lean(decoder, head)
    try:
        if not lean.proved():
            lean.remove()
        yield lean.attached
    finally:
        lean.remove()


class _Lean:
    """A head that drops what has no label, and a loss that knows."""

    def __init__(self, decoder: Any, head: Any) -> None:
        self.decoder, self.head = decoder, head
        self.make: Callable[[Tensor], Tensor] = head.forward
        self.own_loss = vars(decoder).get("_loss_function")
        self.chunked = False
        """Whether the loss may make the logits."""
        self.proving = False
        self.picked: Tensor | None = None
        """(sequences, length), which positions have labels, in a call whose head has not run yet."""
        self.following: Tensor | None = None
        """(1, labels): those."""
        self.states: Tensor | None = None
        """(1, labels, hidden): of what the head received, what the loss is to make logits of."""
        self.instead: Tensor | None = None
        """(1, labels, 0): what the head made instead."""
        self.hooks = [
            decoder.register_forward_pre_hook(self.enter, with_kwargs=True),
            decoder.register_forward_hook(self.leave, always_call=True),
        ]
        head.forward, decoder.loss_function = self.forward, self.loss
        self.attached = True

    def remove(self) -> None:
        if self.attached:
            del self.head.forward
            if self.own_loss is None:
                del self.decoder._loss_function
            else:
                self.decoder._loss_function = self.own_loss
            for hook in self.hooks:
                hook.remove()
        self.attached = False

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.leave()
        labels, following = kwargs.get("labels"), kwargs.get("shift_labels")
        if isinstance(labels, Tensor) and (module.training or self.proving):
            if following is None:
                following = functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
            picked = following != IGNORED
            if picked.any():
                self.picked, self.following = picked, following[picked][None]

    def leave(self, *_: Any) -> None:
        self.picked = self.following = self.states = self.instead = None

    def forward(self, states: Tensor) -> Tensor:
        """Of the head."""
        if self.picked is None or self.picked.shape != states.shape[:-1]:
            self.following = None
            return self.make(states)
        states, self.picked = states[self.picked.to(states.device)][None], None
        # Elsewhere, and under autocast, one product is faster.
        usual = states.device.type == "cpu" and states.dtype == self.head.weight.dtype == torch.float32
        if not (self.chunked and usual) or torch.is_autocast_enabled("cpu"):
            return self.make(states)
        self.states, self.instead = states, states.new_empty(*states.shape[:-1], 0)
        return self.instead

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Of the model, in place of `ForCausalLMLoss`."""
        if self.following is not None:
            shift_labels = self.following.to(logits.device)
        if self.states is None or logits is not self.instead:
            loss: Tensor = ForCausalLMLoss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
            return loss
        assert shift_labels is not None
        total: Tensor = functional.linear_cross_entropy(
            self.states[0],
            self.head.weight,
            shift_labels[0],
            linear_bias=self.head.bias,
            reduction="sum",
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None),
        )
        return total / (shift_labels.numel() if num_items_in_batch is None else num_items_in_batch)

    @torch.no_grad()
    def proved(self) -> bool:
        """Whether the loss of a few made-up tokens is the model's own."""
        device = self.head.weight.device
        vocabulary = self.decoder.config.get_text_config(decoder=True).vocab_size
        ids = (7 * torch.arange(16, device=device) % vocabulary).view(2, 8)
        labels = ids.clone()
        labels[0, :6], labels[1, 3:] = IGNORED, IGNORED
        call = {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(7, device=device)}
        try:
            with evaluating(self.decoder):
                with self._seen() as plain:
                    own = self.decoder(**call).loss
                self.chunked = plain == [True] and _can_chunk(self.head)
                self.proving = True
                found = self.decoder(**call)
        except Exception:  # of whatever kind the model's code stumbles into
            return False
        finally:
            self.proving = False
        rows = found.logits.shape[:-1].numel()
        tolerance = max(TOLERANCE, 2 * torch.finfo(self.head.weight.dtype).eps)
        return rows == int((labels[:, 1:] != IGNORED).sum()) and torch.allclose(
            found.loss, own, rtol=tolerance
        )

    @contextmanager
    def _seen(self) -> Iterator[list[bool]]:
        """For each product of the head within, whether it goes into the loss as it is."""
        plain: list[bool] = []
        made: list[tuple[Tensor, int]] = []

        def see(_: nn.Module, __: Any, output: Tensor) -> None:
            made.append((output, output._version))

        def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            plain.extend(logits is each and logits._version == version for each, version in made)
            return self.loss(logits, *args, **kwargs)

        hook = self.head.register_forward_hook(see)
        self.decoder.loss_function = loss
        try:
            yield plain
        finally:
            hook.remove()
            self.decoder.loss_function = self.loss


def _can_chunk(head: nn.Module) -> bool:
    """By a torch that has it."""
    return hasattr(functional, "linear_cross_entropy") and type(head) is nn.Linear
