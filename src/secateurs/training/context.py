"""Training steps that only read what stands before the answers.

In fine-tuning on answers a question has no loss of its own. A backward pass through it costs twice its
forward pass, and brings how its states would have to change to make the answer likelier. Here the context of
each sequence, all before its first label, goes through the model without gradients and leaves its keys and
values; what follows attends to those. Loss and predictions are the model's own; gradients are those of what
the following tokens do. Neither is the context's backward pass made nor are its activations kept.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig

from secateurs.training.head import IGNORED, TOLERANCE
from secateurs.training.omission import decoder_of, evaluating

GIVEN = ("input_ids", "attention_mask", "labels")
"""What of a call is divided. With other tensors of several dimensions it is left as it is."""

ANGLES_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that turn keys by how long the whole is: its parts would be turned otherwise."""

PROOF = 48
"""Tokens of a sequence to prove it on: more than the windows of models that are made small for tests."""

WORTH = 0.95
"""Tokens in two paddings are more than in one: of the cost of the whole, what the parts may cost together."""


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
    decoder: Any = decoder_of(model)
    if decoder in _reading:
        yield True
        return
    # Some call what lies within the one, some the one within the other.
    places = dict.fromkeys((decoder.base_model, decoder.get_decoder()))
    for inner in () if _looks_at_the_whole(decoder.config) else places:
        reading = _Reading(decoder, inner)
        try:
            if reading.proved():
                yield True
                return
        finally:
            reading.remove()
    yield False


def context_length(model: nn.Module) -> float | None:
    """The tokens of a sequence, on average, that the last training step of a model only read; None where it
    does not read so."""
    reading = _reading.get(decoder_of(model))
    return None if reading is None else reading.length


def _looks_at_the_whole(config: PretrainedConfig) -> bool:
    """Whether a model does something by the length of what it is called with, or at random for each call."""
    config = config.get_text_config(decoder=True)
    rotary: Any = getattr(config, "rope_parameters", None) or {}
    kinds = [rotary, *rotary.values()]  # one for all layers, or one for each type of them
    types = {kind.get("rope_type") for kind in kinds if isinstance(kind, dict)}
    chooses = getattr(config, "index_topk", None) or getattr(config, "layerdrop", 0)
    return bool(types.intersection(ANGLES_BY_LENGTH)) or bool(chooses)


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
    mask = mask != 0
    ends = mask.sum(dim=1)
    labelled = (labels != IGNORED) & (places > 0)
    if (
        not ends.all()
        or (mask != (places < ends[:, None])).any()
        or (labelled & (places > ends[:, None])).any()
    ):
        return None
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


class _Reading:
    """What changes the calls of a decoder."""

    def __init__(self, decoder: Any, inner: Any) -> None:
        """Of a model, and of what it has between embedding and head."""
        self.decoder, self.inner = decoder, inner
        self.make = self.inner.forward
        self.before = vars(inner).get("forward")
        self.names = list(inspect.signature(self.make).parameters)
        self.labels: Tensor | None = None
        """(sequences, length), of a call that has not come to the blocks yet."""
        self.length = 0.0
        self.proving = False
        self.hooks = [
            decoder.register_forward_pre_hook(self.enter, with_kwargs=True),
            decoder.register_forward_hook(self.leave, always_call=True),
        ]
        self.inner.forward = self.forward
        _reading[decoder] = self

    def remove(self) -> None:
        del self.inner.forward, _reading[self.decoder]
        if self.before is not None:
            self.inner.forward = self.before
        for hook in self.hooks:
            hook.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.length = 0.0
        labels = kwargs.get("labels")
        learns = module.training or self.proving
        self.labels = labels if isinstance(labels, Tensor) and learns else None

    def leave(self, *_: Any) -> None:
        self.labels = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of that of what is between embedding and head."""
        labels, self.labels = self.labels, None
        kwargs |= dict(zip(self.names, args, strict=False))
        parts = None if labels is None else self._parts(labels, kwargs)
        if labels is None or parts is None:
            return self.make(**kwargs)
        context, rest = parts
        kwargs |= {"use_cache": True}
        kwargs.pop("labels", None)  # that some hand on, and do nothing with
        with torch.no_grad():
            read = self.make(**{**kwargs, **context.given()})
        if torch.is_autocast_enabled(context.ids.device.type):
            torch.clear_autocast_cache()  # of weights that were cast without gradients
        kwargs |= {**rest.given(before=context), "past_key_values": read.past_key_values}
        output = self.make(**kwargs)
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
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.shape != labels.shape:
            return None
        for name, value in call.items():
            if name not in GIVEN and isinstance(value, Tensor) and value.dim() > 1:
                return None
            if name.startswith("output_") and value:
                return None
        config = self.decoder.config.get_text_config(decoder=True)
        if any(getattr(config, f"output_{what}", False) for what in ("router_logits", "hidden_states")):
            return None
        if any(getattr(module, "gradient_checkpointing", False) for module in self.inner.modules()):
            return None
        mask = torch.ones_like(ids) if mask is None else mask
        known = isinstance(mask, Tensor) and mask.shape == labels.shape
        return divided(ids, mask, labels) if known else None

    def proved(self) -> bool:
        """Whether a few made-up tokens have the model's own loss, and embeddings their own gradient."""
        device = next(self.decoder.parameters()).device
        vocabulary = self.decoder.config.get_text_config(decoder=True).vocab_size
        ids = (7 * torch.arange(2 * PROOF, device=device) % vocabulary).view(2, PROOF)
        places = torch.arange(PROOF, device=device)
        begins, ends = (torch.tensor(each, device=device)[:, None] for each in ([30, 22], [PROOF, PROOF - 5]))
        labels = ids.where((places >= begins) & (places < ends), IGNORED)
        mask = (places < ends).long()
        call = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
        # The token before the first label, and those behind it.
        follows = (places >= begins - 1) & (places < ends)
        counts = follows.sum(dim=1, keepdim=True)
        try:
            with evaluating(self.decoder):
                loss, gradient = self._learnt(call)
                self.proving = True
                found, others = self._learnt(call)
        except Exception:  # of whatever kind the model's code stumbles into
            return False
        finally:
            self.proving = False
        if others.shape[:2] != (2, int(counts.max())) or not gradient.any():
            return False
        own, others = gradient[follows], others[places[: others.shape[1]] < counts]
        rounding = torch.finfo(gradient.dtype).eps
        near = (own - others).norm() <= max(100 * TOLERANCE, 4 * rounding) * own.norm()
        return bool(near) and torch.allclose(found, loss, rtol=max(TOLERANCE, rounding))

    def _learnt(self, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient of the embeddings that were looked up with gradients."""
        looked_up: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            looked_up.append(output.detach().requires_grad_())
            return looked_up[-1]

        hook = self.decoder.get_input_embeddings().register_forward_hook(keep)
        try:
            # What autocast rounds would hide what is wrong.
            with torch.enable_grad(), torch.autocast(self.decoder.device.type, enabled=False):
                loss = self.decoder(**call).loss
                (gradient,) = torch.autograd.grad(loss, looked_up)
        finally:
            hook.remove()
        return loss.detach(), gradient


_reading: WeakKeyDictionary[nn.Module, _Reading] = WeakKeyDictionary()
"""What changes a decoder's calls at the moment."""
