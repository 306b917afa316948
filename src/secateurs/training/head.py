"""Logits only where there are labels: in fine-tuning on answers the head's work shrinks to theirs.

Between a model's backbone and its head the final states of positions without a label are dropped. What the
model's own code does with logits and labels after that (scales, soft caps, the mean over a whole batch of
accumulated ones) it does to the others, so loss and gradients are its own up to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.training.omission import decoder_of, unwrapped

IGNORED = -100
"""What stands for no label in transformers."""

TOLERANCE = 1e-2
"""By how much, relatively, the proof's two losses may differ: in bfloat16 by a thousandth or so."""


@contextmanager
def logits_where_labels(model: nn.Module) -> Iterator[bool]:
    """Within it a model in training mode, called with `labels`, makes logits for labelled positions only.

    The `logits` that it returns beside its loss are theirs, in one row: (1, labels, vocabulary). It is proved
    first, on a few tokens, that the loss is still the model's own; if not, nothing changes. Calls without
    labels (label smoothing takes them away), with labels at every position, or in evaluation mode are the
    model's own.

    Args:
        model: what training calls, or the model inside its wrapping (DDP, PEFT). Not to be compiled: how many
            labels there are changes from batch to batch.

    Yields:
        Whether it does.
    """
    picking = _Picking(unwrapped(model))
    proved = picking.proved()
    if not proved:
        picking.remove()
    try:
        yield proved
    finally:
        picking.remove()


class _Picking:
    """Hooks that drop what has no label between backbone and head."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.decoder = model, decoder_of(model)
        self.picked: Tensor | None = None  # (sequences, length), in a call whose head has not run yet
        self.proving = False
        backbone: Any = self.decoder.base_model
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            backbone.register_forward_hook(self._pick),
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.picked = None
        labels = kwargs.get("labels")
        if not (module.training or self.proving) or labels is None or kwargs.get("shift_labels") is not None:
            return None
        following = functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
        picked = following != IGNORED
        if not 0 < int(picked.sum()) < labels[..., 1:].numel():
            return None
        self.picked = picked
        return args, {**kwargs, "shift_labels": following[picked][None]}

    def _pick(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.picked is not None:
            states = output.last_hidden_state
            output.last_hidden_state = states[self.picked.to(states.device)][None]
            self.picked = None
        return output

    @torch.no_grad()
    def proved(self) -> bool:
        """Whether the loss of a few made-up tokens is the model's own."""
        device = next(self.decoder.parameters()).device
        config: Any = self.decoder.config
        vocabulary = config.get_text_config(decoder=True).vocab_size
        ids = (7 * torch.arange(16, device=device) % vocabulary).view(2, 8)
        labels = ids.clone()
        labels[0, :6], labels[1, 3:] = IGNORED, IGNORED
        call = {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(7, device=device)}
        modes = [module for module in self.model.modules() if module.training]
        for module in modes:
            module.training = False
        try:
            own = self.model(**call).loss
            self.proving = True
            output = self.model(**call)
        except Exception:  # of whatever kind the model's code stumbles into
            return False
        finally:
            self.proving = False
            for module in modes:
                module.training = True
        rows = output.logits.shape[:-1].numel()
        return rows == int((labels[:, 1:] != IGNORED).sum()) and torch.allclose(
            output.loss, own, rtol=TOLERANCE
        )
