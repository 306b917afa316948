"""Which heads and channels matter, measured by a small dense forward pass.

All units are measured on the same pass of the whole model, those that training omits at the moment and those
that it runs: measured each in its own way they could not be compared.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers.pytorch_utils import Conv1D

from secateurs.training.cutting import whole_of
from secateurs.training.head import IGNORED
from secateurs.training.omission import Omission, decoder_of, evaluating
from secateurs.training.units import Kind

Importance = Literal["activation", "weighted", "taylor", "fisher", "magnitude", "uniform"]
METRICS: tuple[Importance, ...] = get_args(Importance)
WITH_LOSS: tuple[Importance, ...] = ("taylor", "fisher")
"""Those that take a backward pass."""

Scores = list[dict[Kind, Tensor]]
"""For each block, and kind that it has units of, their importance (groups, size), not negative, on the
CPU."""

PROBE_TOKENS = 512
"""About as many tokens are read by a probe. Twice as many choose next to no better, a quarter up to two per
cent worse (benchmarks/sat_probe_interval.py)."""


_INPUTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),  # of packed sequences
}
"""What of a call's keyword arguments a pass without a loss needs."""


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The batch in a call of a model: ids (sequences, length), or embeddings (sequences, length, hidden)."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(value, Tensor):
            return value
    raise ValueError(
        "call the model with input_ids or inputs_embeds: sparse training reads the batch's shape"
    )


def probed(args: tuple[Any, ...], kwargs: dict[str, Any], metric: Importance) -> tuple[int, int]:
    """How many sequences of a call's batch a probe runs, and how many tokens of each: the first.

    All tokens where it takes the loss, for which a sequence may have no label but at its end; and where masks
    or positions are not (sequences, length), or most of those tokens would be padding.
    """
    size, length = batch_of(args, kwargs).shape[:2]
    few = min(size, max(1, PROBE_TOKENS // length))
    inputs = [value for key, value in kwargs.items() if key in _INPUTS and isinstance(value, Tensor)]
    even = all(value.shape[:2] == (size, length) for value in inputs)
    mask = kwargs.get("attention_mask")
    some = mask is None
    if isinstance(mask, Tensor):
        some = bool(mask[:few, :PROBE_TOKENS].float().mean() > 0.5)
    return few, length if metric in WITH_LOSS or not (even and some) else min(length, PROBE_TOKENS)


def measure(
    model: nn.Module, omission: Omission, metric: Importance, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Scores:
    """Measure the importance of every unit of a whole model.

    - "activation": root mean square, over tokens, of what the unit hands to the layer that reads it.
    - "weighted": the same, each value times the norm of the weights that read it (Wanda's score, arXiv
      2306.11695, summed over a unit): about what the unit adds to the residual stream.
    - "taylor": mean |activation * gradient|: to first order what the loss would change by without the unit
      (arXiv 1905.10650, equation 1). Costs a backward pass.
    - "fisher": mean (activation * gradient)^2: to second order, by the diagonal of the empirical Fisher
      matrix. Costs a backward pass.
    - "magnitude": norm of all the unit's weights. No forward pass.
    - "uniform": 1 for each.

    Args:
        model: what training calls, in whatever wrapping. Its parameters must be whole.
        omission: of that model.
        metric: one of METRICS.
        args: of a call of the model with a batch.
        kwargs: of the same call.
    """
    if metric == "uniform":
        return [{k: torch.ones(u.groups, u.size) for k, u in b.units.items()} for b in omission.blocks]
    if metric == "magnitude":
        return _shape(omission, [_magnitudes(omission, block, kind) for block, kind in _cells(omission)])
    args, kwargs, token_mask = _few_tokens(model, args, kwargs, metric)
    sums = _Sums(omission, metric, token_mask)
    with evaluating(model), sums.recording(), torch.set_grad_enabled(metric in WITH_LOSS):
        output = model(*args, **kwargs)
        if metric in WITH_LOSS:
            sums.add_gradients(output.loss)
    return _shape(omission, sums.means())


def _cells(omission: Omission) -> list[tuple[int, Kind]]:
    return [(number, kind) for number, block in enumerate(omission.blocks) for kind in block.cuts]


def _shape(omission: Omission, scores: Sequence[Tensor]) -> Scores:
    """Scores of the cells, each (units,), in the cells' order."""
    flat = torch.cat(list(scores))
    if dist.is_initialized():
        dist.broadcast(flat, 0)  # where sums are rounded in another order, ranks would choose otherwise
    pieces = iter(flat.cpu().split([len(s) for s in scores]))
    return [
        {kind: next(pieces).view(units.groups, -1) for kind, units in block.units.items()}
        for block in omission.blocks
    ]


def _by_unit(values: Tensor, unit: Tensor, units: int) -> Tensor:
    """Sum what belongs to each unit: (..., positions) -> (..., units)."""
    sums = values.new_zeros(*values.shape[:-1], units + 1)
    # -1, what is always kept, is summed at the end and dropped.
    return sums.index_add_(-1, (unit % (units + 1)).to(values.device), values)[..., :-1]


def _whole_weight(layer: nn.Linear | Conv1D) -> Tensor:
    return whole_of(layer.weight).float()


def _magnitudes(omission: Omission, block: int, kind: Kind) -> Tensor:
    units, layers = omission.blocks[block].units[kind], omission.blocks[block].layers[kind]
    squares = [
        _by_unit(_whole_weight(layer.module).square().sum(1 - layer.slices[0].dim), layer.unit, units.count)
        for layer in layers
    ]
    return torch.stack(squares).sum(0).sqrt()


class _Sums:
    """What the readers of each block receive, summed over tokens as the metric wants it."""

    def __init__(self, omission: Omission, metric: Importance, token_mask: Tensor | None) -> None:
        self.omission, self.metric, self.token_mask = omission, metric, token_mask
        self.sums: dict[tuple[int, Kind], Tensor] = {}
        self.inputs: dict[tuple[int, Kind], Tensor] = {}
        self.tokens = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        hooks = [
            self.omission.blocks[block].readers[kind].register_forward_pre_hook(self._recorder(block, kind))
            for block, kind in _cells(self.omission)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _recorder(self, block: int, kind: Kind) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def record(_: nn.Module, args: tuple[Any, ...]) -> Any:
            states = args[0]
            if self.metric in WITH_LOSS:
                if not states.requires_grad:  # everything up to here is frozen
                    states = states.detach().requires_grad_()
                self.inputs[block, kind] = states
                return (states, *args[1:])
            squares = self._select(states.detach()).float().square().sum(0)
            if self.metric == "weighted":
                reader = self.omission.blocks[block].reader(kind)  # of LoRA's layers the base
                squares *= _whole_weight(reader.module).square().sum(1 - reader.slices[0].dim)
            self.sums[block, kind] = self._by_unit(squares, block, kind)
            return None

        return record

    def _by_unit(self, values: Tensor, block: int, kind: Kind) -> Tensor:
        cut = self.omission.blocks[block].cuts[kind]
        return _by_unit(values, cut.inputs, cut.units.count)

    def _select(self, states: Tensor) -> Tensor:
        """(tokens, width) without padding."""
        flat = states.reshape(-1, states.shape[-1])
        if self.token_mask is not None:
            flat = flat[self.token_mask.flatten()]
        self.tokens = len(flat)
        return flat

    def add_gradients(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, list(self.inputs.values()))
        for (cell, states), gradient in zip(self.inputs.items(), gradients, strict=True):
            change = self._select(states.detach() * gradient).float()
            by_unit = self._by_unit(change, *cell)
            self.sums[cell] = (by_unit.abs() if self.metric == "taylor" else by_unit.square()).sum(0)

    def means(self) -> Sequence[Tensor]:
        """Over the tokens of all processes."""
        cells = [self.sums[cell] for cell in _cells(self.omission)]
        flat = torch.cat([*cells, cells[0].new_tensor([self.tokens])])
        if dist.is_initialized():
            dist.all_reduce(flat)
        means = flat[:-1] / flat[-1]
        return (means if self.metric in WITH_LOSS else means.sqrt()).split([len(cell) for cell in cells])


def _few_tokens(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], metric: Importance
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Arguments of a call with few sequences of a batch; which of their tokens are no padding."""
    ids = batch_of(args, kwargs)
    size, length = ids.shape[:2]
    few, most = probed(args, kwargs, metric)
    rows = torch.arange(few)
    if metric in WITH_LOSS and isinstance(kwargs.get("labels"), Tensor):
        labelled = (kwargs["labels"] != IGNORED).any(dim=-1).byte().cpu()
        rows = labelled.argsort(descending=True, stable=True)[:few]  # one without a label has no gradient

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
            return value
        first = value[rows.to(value.device)]
        return first[:, :most] if value.shape[:2] == (size, length) else first

    if metric in WITH_LOSS:
        # The training's own call, but with the mean of these sequences for a loss.
        batch = {key: cut(value) for key, value in kwargs.items() if key != "num_items_in_batch"}
        batch.setdefault("labels", cut(ids))
    else:
        batch = {key: cut(value) for key, value in kwargs.items() if key in _INPUTS}
        if "logits_to_keep" in inspect.signature(decoder_of(model).forward).parameters:
            batch["logits_to_keep"] = 1  # the head would cost more than a small model's blocks
    mask = batch.get("attention_mask")
    one_each = isinstance(mask, Tensor) and mask.shape == cut(ids).shape[:2]
    return (
        tuple(map(cut, args)),
        batch | {"use_cache": False},
        cast(Tensor, mask).bool() if one_each else None,
    )
