"""Calls of a decoder that are made in another way, proved beforehand to learn the same."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from secateurs.training.head import IGNORED, TOLERANCE
from secateurs.training.omission import decoder_of, evaluating

GIVEN = ("input_ids", "attention_mask", "labels")
"""What of a call can be divided. With other tensors of several dimensions it is left as it is."""

ANGLES_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that turn keys by how long the whole is: what is divided would be turned otherwise."""

PROOF = 48
"""Tokens of a sequence to prove it on: more than the windows of models that are made small for tests."""

WORTH = 0.95
"""Of the cost of a call, what another way may cost."""

_as_ever = WeakSet[nn.Module]()
"""Decoders whose calls are made as ever for now, whatever other ways there are."""


@contextmanager
def calls_as_ever(model: nn.Module) -> Iterator[None]:
    """Within, a model's calls are made in no other way."""
    decoder = decoder_of(model)
    before = decoder in _as_ever
    _as_ever.add(decoder)
    try:
        yield
    finally:
        if not before:
            _as_ever.discard(decoder)


class OtherWay(ABC):
    """A way to make calls of a decoder, in place of what it has between embedding and head.

    Args:
        decoder: with head and loss.
        inner: what is between them; its `forward` is replaced.

    Attributes:
        own: that forward pass.
        labels: (sequences, length), of a call that has not come to `inner` yet.
        proving: whether the model learns, though it is not in training.
    """

    def __init__(self, decoder: Any, inner: Any) -> None:
        self.decoder, self.inner = decoder, inner
        self.own = inner.forward
        self.labels: Tensor | None = None
        self.proving = False
        self._names = list(inspect.signature(self.own).parameters)
        self._before = vars(inner).get("forward")
        self._hooks = [
            decoder.register_forward_pre_hook(self.enter, with_kwargs=True),
            decoder.register_forward_hook(self.leave, always_call=True),
        ]
        inner.forward = self.forward

    def remove(self) -> None:
        del self.inner.forward
        if self._before is not None:
            self.inner.forward = self._before
        for hook in self._hooks:
            hook.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        self.labels = labels if isinstance(labels, Tensor) else None

    def leave(self, *_: Any) -> None:
        self.labels = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of that of what is between embedding and head."""
        kwargs |= dict(zip(self._names, args, strict=False))
        labels, self.labels = self.labels, None
        output = None if self.decoder in _as_ever else self.output_of(kwargs, labels)
        return self.own(**kwargs) if output is None else output

    @abstractmethod
    def output_of(self, call: dict[str, Any], labels: Tensor | None) -> Any:
        """The output of a call by these arguments, with `last_hidden_state` (sequences, length, hidden); None
        where it is to be made as ever."""

    @abstractmethod
    def paired(
        self, own: Tensor, found: Tensor, follows: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Gradients of the same embeddings, (tokens, hidden) each.

        Args:
            own: (sequences, length, hidden), as the model makes them of a batch.
            found: as they come this way, in rows and columns of its own.
            follows: (sequences, length), from the token that predicts the first label on.
            there: (sequences, length), where there is a token.

        Returns:
            None if these are not the embeddings that were to be looked up.
        """

    def batch(self, call: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Ids and mask, (sequences, length) each, of a call that asks for nothing but the last states."""
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or call.get("return_dict") is False:
            return None
        for name, value in call.items():
            if name not in GIVEN and isinstance(value, Tensor) and value.dim() > 1:
                return None
            if name.startswith("output_") and value:
                return None
        config = self.decoder.config.get_text_config(decoder=True)
        if any(getattr(config, f"output_{what}", False) for what in ("router_logits", "hidden_states")):
            return None
        mask = torch.ones_like(ids) if mask is None else mask
        return (ids, mask) if isinstance(mask, Tensor) and mask.shape == ids.shape else None

    def proved(self) -> bool:
        """Whether a few made-up tokens have the model's own loss, and embeddings their own gradient."""
        device = next(self.decoder.parameters()).device
        vocabulary = self.decoder.config.get_text_config(decoder=True).vocab_size
        ids = (7 * torch.arange(2 * PROOF, device=device) % vocabulary).view(2, PROOF)
        places = torch.arange(PROOF, device=device)
        begins, ends = (torch.tensor(each, device=device)[:, None] for each in ([30, 22], [PROOF, PROOF - 5]))
        there = places < ends
        labels = ids.where((places >= begins) & there, IGNORED)
        call = {"input_ids": ids, "attention_mask": there.long(), "labels": labels, "use_cache": False}
        try:
            with evaluating(self.decoder):
                with calls_as_ever(self.decoder):
                    loss, gradient = self.learnt(call)
                self.proving = True
                found, others = self.learnt(call)
                pair = self.paired(gradient, others, (places >= begins - 1) & there, there)
                if pair is None or not gradient.any() or not self.keeps_apart(call):
                    return False
        except Exception:  # of whatever kind the model's code stumbles into
            return False
        finally:
            self.proving = False
        own, others = pair
        rounding = torch.finfo(gradient.dtype).eps
        near = (own - others).norm() <= max(100 * TOLERANCE, 4 * rounding) * own.norm()
        return bool(near) and torch.allclose(found, loss, rtol=max(TOLERANCE, rounding))

    def keeps_apart(self, call: dict[str, Any]) -> bool:
        """Whether sequences of a call learn nothing from each other, where that is not plain."""
        return True

    def learnt(self, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss of a call, and its gradient of the embeddings that were looked up with gradients."""
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


W = TypeVar("W", bound=OtherWay)


@contextmanager
def proven_way(
    model: nn.Module, start: Callable[[Any, Any], W], ways: MutableMapping[nn.Module, W]
) -> Iterator[W | None]:
    """Within, a model's calls are made in another way, if that is proved to learn the same.

    Args:
        model: in whatever wrapping.
        start: gives the way, of a decoder and of what it has between embedding and head.
        ways: of this kind that there are at the moment, by their decoders.

    Yields:
        It, which is that of a context around this one if there is one; or None.
    """
    decoder: Any = decoder_of(model)
    if decoder in ways:
        yield ways[decoder]
        return
    # Some call what lies within the one, some the one within the other.
    places = dict.fromkeys((decoder.base_model, decoder.get_decoder()))
    for inner in () if _looks_at_the_whole(decoder.config) else places:
        way = start(decoder, inner)
        try:
            if way.proved():
                ways[decoder] = way
                yield way
                return
        finally:
            ways.pop(decoder, None)
            way.remove()
    yield None


def counts_of(mask: Tensor, labels: Tensor | None) -> Tensor | None:
    """How many tokens sequences have.

    Args:
        mask: (sequences, length), not 0 where there is a token.
        labels: (sequences, length), IGNORED where there is none.

    Returns:
        (sequences,); None where there is padding before or between tokens, or padding predicts a label.
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    counts = (mask != 0).sum(dim=1)
    misplaced = ((mask != 0) != (places < counts[:, None])).any()
    if labels is not None:
        misplaced |= ((labels != IGNORED) & (places > counts[:, None])).any()
    return None if misplaced or not counts.all() else counts


def _looks_at_the_whole(config: PretrainedConfig) -> bool:
    """Whether a model does something by the length of what it is called with, or at random for each call."""
    config = config.get_text_config(decoder=True)
    rotary: Any = getattr(config, "rope_parameters", None) or {}
    kinds = [rotary, *rotary.values()]  # one for all layers, or one for each type of them
    types = {kind.get("rope_type") for kind in kinds if isinstance(kind, dict)}
    chooses = getattr(config, "index_topk", None) or getattr(config, "layerdrop", 0)
    return bool(types.intersection(ANGLES_BY_LENGTH)) or bool(chooses)
