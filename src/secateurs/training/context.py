"""Training steps that only read what stands before the answers.

In fine-tuning on answers a question has no loss of its own. A backward pass through it costs twice its
forward pass, and brings how its states would have to change to make the answer likelier. Here the context of
each sequence, all before its first label, goes through the model without gradients and leaves its keys and
values; what follows attends to those. Loss and predictions are the model's own; gradients are those of what
the following tokens do. Neither is the context's backward pass made nor are its activations kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from secateurs.training.calls import WORTH, OtherWay, counts_of, proven_way
from secateurs.training.head import IGNORED
from secateurs.training.omission import decoder_of


@contextmanager
def context_read_only(model: nn.Module) -> Iterator[bool]:
    """Within, a model in training mode that is called with `labels` learns from the first of them on.

    In evaluation mode and without labels the model is as ever, and so it is where little stands before the
    labels, with padding on the left, with gradient checkpointing, which leaves no keys and values, and where
    more is asked for than the loss and the last states (positions of one's own, routers' logits). It is
    proved first, on a few tokens, that the loss and what follows the context learns are the model's own; if
    not (states instead of keys and values, parts that do not take padding), nothing changes.

    Args:
        model: a decoder whose parameters are whole, or its wrapping (DDP, PEFT). Not to be compiled: sizes
            change from batch to batch.

    Yields:
        Whether it does.
    """
    with proven_way(model, _Reading, _reading) as reading:
        yield reading is not None


def context_length(model: nn.Module) -> float | None:
    """The tokens of a sequence, on average, that the last training step of a model only read; None where it
    does not read so."""
    reading = _reading.get(decoder_of(model))
    return None if reading is None else reading.length


class Part(NamedTuple):
    """Some columns of a batch in their order."""

    ids: Tensor
    mask: Tensor
    """1 where there is a token, all (sequences, columns)."""
    positions: Tensor
    """The columns of the batch that these are."""

    def given(self, before: "Part | None" = None) -> dict[str, Tensor]:
        """Arguments of a call, with another part's keys and values if there was one before."""
        mask = self.mask if before is None else torch.cat([before.mask, self.mask], dim=1)
        return {"input_ids": self.ids, "attention_mask": mask, "position_ids": self.positions}


def divided(ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Part, Part] | None:
    """A batch's contexts, padded on the left, and what follows them, padded on the right.

    What follows begins with the token before the first label, which predicts it.

    Args:
        ids: (sequences, length).
        mask: (sequences, length), not 0 where there is a token.
        labels: (sequences, length), IGNORED where there is none.

    Returns:
        None if nothing stands before the labels, or too little to pay; and where there is padding before or
        between tokens, or padding predicts a label.
    """
    length = ids.shape[1]
    places = torch.arange(length, device=ids.device)
    ends = counts_of(mask, labels)
    if ends is None:
        return None
    labelled = (labels != IGNORED) & (places > 0)
    # A sequence without a label is all context, but for a last token.
    first = torch.where(labelled.any(dim=1), labelled.long().argmax(dim=1), ends) - 1
    context, rest = first.tolist(), (ends - first).tolist()
    if not max(context) or max(context) + 3 * max(rest) > WORTH * 3 * length:
        return None

    def part(begin: list[int], counts: list[int], side: str) -> Part:
        rows = [places[start : start + count] for start, count in zip(begin, counts, strict=True)]
        at = pad_sequence(rows, batch_first=True, padding_side=side)
        there = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        return Part(ids.gather(1, at), there, at)

    return part([0] * len(context), context, "left"), part(context, rest, "right")


class _Reading(OtherWay):
    """By what stands before the labels, and what follows."""

    length = 0.0
    """Tokens of a sequence, on average, that the last call only read."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().enter(module, args, kwargs)
        self.length = 0.0

    def output_of(self, call: dict[str, Any], labels: Tensor | None) -> Any:
        learns = self.decoder.training or self.proving
        parts = self._parts(labels, call) if learns and labels is not None else None
        if labels is None or parts is None:
            return None
        context, rest = parts
        call = {**call, "use_cache": True}
        call.pop("labels", None)  # that some hand on, and do nothing with
        with torch.no_grad():
            read = self.own(**{**call, **context.given()})
        if torch.is_autocast_enabled(context.ids.device.type):
            torch.clear_autocast_cache()  # of weights that were cast without gradients
        call |= {**rest.given(before=context), "past_key_values": read.past_key_values}
        output = self.own(**call)
        output.past_key_values = None
        states = output.last_hidden_state
        whole = states.new_zeros(*labels.shape, states.shape[-1])
        for part, found in ((context, read.last_hidden_state), (rest, states)):
            rows, columns = part.mask.nonzero(as_tuple=True)
            whole = whole.index_put((rows, part.positions[rows, columns]), found[rows, columns])
        output.last_hidden_state = whole
        self.length = float(context.mask.sum()) / len(labels)
        return output

    def _parts(self, labels: Tensor, call: dict[str, Any]) -> tuple[Part, Part] | None:
        """None where a call is to be left as it is."""
        batch = self.batch(call)
        if batch is None or batch[0].shape != labels.shape:
            return None
        if any(getattr(module, "gradient_checkpointing", False) for module in self.inner.modules()):
            return None
        return divided(*batch, labels)

    def paired(
        self, own: Tensor, found: Tensor, follows: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        counts = follows.sum(dim=1, keepdim=True)
        longest = int(counts.max())
        if found.shape[:2] != (len(own), longest):
            return None
        return own[follows], found[torch.arange(longest, device=own.device) < counts]


_reading: WeakKeyDictionary[nn.Module, _Reading] = WeakKeyDictionary()
"""What changes a decoder's calls at the moment."""
