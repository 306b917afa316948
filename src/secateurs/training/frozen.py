"""Omitted neurons do not move: an optimiser's step sees only the slices that run.

Of each sliced parameter the optimiser is handed the kept slices, with their gradient and their state.
Momentum, weight decay and statistics over a whole tensor (Adafactor's) then touch nothing else, whatever the
optimiser and its implementation, and a step costs as much as those slices do. The state stays small from one
change of the set to the next.

A neuron that wakes late needs one thing more. Adam divides its averages by 1 - beta^t, with one step count t
for a whole tensor. For a neuron that has run only n of those t steps the first update would come out up to
(1 - beta1) / sqrt(1 - beta2) = 3.2 times too long, so its updates are scaled to what its own count asks for.
Adafactor has no such counts: a neuron that never ran starts from the mean of the others' second moments.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from secateurs.training.omission import Kind, Omission, Reordered, Slice, local, stand_in

Counts = Sequence[dict[Kind, Tensor]]
"""For each block and kind, the optimiser steps that each unit has run (groups, size)."""

_ROWS_AND_COLUMNS = {"exp_avg_sq_row": 0, "exp_avg_sq_col": 1}
"""The dimension that transformers' Adafactor keeps in each of its factors."""

_ADAFACTOR = {*_ROWS_AND_COLUMNS, "exp_avg_sq", "row_var", "col_var", "variance"}
"""Second moments of Adafactor, transformers' and torch's."""


class FrozenOptimizer:
    """Keeps an optimiser off what is omitted.

    Args:
        optimizer: one that keeps for each parameter nothing but numbers, tensors of the parameter's shape,
            and averages over its rows or columns.
        omission: says what is omitted.
    """

    def __init__(self, optimizer: Optimizer, omission: Omission) -> None:
        self.optimizer, self.omission = optimizer, omission
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._slices = [piece for piece in omission.slices if id(piece.parameter) in self._groups]
        self._shapes = {piece: local(piece.parameter).shape for piece in self._slices}
        self._state: dict[tuple[Slice, str], Reordered] = {}
        self._whole: list[tuple[Slice, Tensor, Tensor | None]] = []  # parameter and gradient during a step
        self._late: list[tuple[Slice, Tensor, Tensor]] = []  # positions among the kept; steps they are behind
        self._before: list[Tensor] = []
        states = (optimizer.state.get(piece.parameter, {}) for piece in self._slices)
        self.steps = max((int(state.get("step", 0)) for state in states), default=0)
        """Steps that the optimiser has made."""
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def detach(self) -> None:
        """Leave the optimiser, with its state whole."""
        self.widen()
        for hook in self._hooks:
            hook.remove()

    def widen(self) -> None:
        """Make the state whole: to save it, or before the set changes."""
        for piece, state, key, dim in self._sliced_state():
            small = local(state[key])
            if (piece, key) in self._state:
                _set(state, key, self._state[piece, key].whole(small))
            elif small.shape[dim] != len(piece.unit):  # made by a step, so for the kept slices alone
                assert piece.index is not None
                shape = (*small.shape[:dim], len(piece.unit), *small.shape[dim + 1 :])
                whole = torch.zeros(shape, dtype=small.dtype, device=small.device)
                _set(state, key, whole.index_copy_(dim, piece.index, small))
        self._state.clear()

    def choose(self, counts: Counts) -> None:
        """Take note of a new set.

        Args:
            counts: the steps of each unit, to find the kept ones that are behind the optimiser's own.
        """
        self._late = []
        if not isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            return
        for piece in self._slices:
            if piece.index is not None:
                own = torch.cat([counts[piece.block][piece.kind].flatten(), torch.tensor([self.steps])])
                behind = (self.steps - own[piece.unit])[piece.index.cpu()]
                late = behind.nonzero().flatten()
                if len(late):
                    device = piece.index.device
                    self._late.append((piece, late.to(device), behind[late].to(device, torch.float32)))

    def _before_step(self) -> None:
        self.omission.engage()  # somebody may have evaluated since the backward pass
        if not self.omission.in_place:
            self._hand_over()
        for piece, state, key, dim in self._sliced_state():
            value = local(state[key])
            if (piece, key) in self._state or value.shape[dim] != len(piece.unit):
                continue
            assert piece.order is not None
            assert piece.index is not None
            reordered = Reordered(value, dim, piece.order, len(piece.index))
            self._state[piece, key] = reordered
            _set(state, key, reordered.part)
            if self._is_adafactor and key in _ADAFACTOR:
                _fill_unseen(reordered.part)
        self._before = [_rows(piece).index_select(0, late) for piece, late, _ in self._late]

    def _after_step(self) -> None:
        self.steps += 1
        for (piece, late, behind), before in zip(self._late, self._before, strict=True):
            group = self._groups[id(piece.parameter)]
            scale = _correction(self.steps, behind, *group["betas"]).to(before.dtype)
            if group.get("decoupled_weight_decay"):
                before *= 1 - group["lr"] * group["weight_decay"]
            rows = _rows(piece)
            after = rows.index_select(0, late)
            scale = scale.view(-1, *[1] * (before.dim() - 1))
            rows.index_copy_(0, late, torch.lerp(before, after, scale))
        self._before = []
        self._take_back()

    def _hand_over(self) -> None:
        """Let the kept slices stand for parameters and gradients that are whole."""
        for piece in self._slices:
            parameter, gradient = piece.parameter, piece.parameter.grad
            if piece.index is None:
                continue
            data = local(parameter)
            if gradient is None:
                self._whole.append((piece, data, None))
                stand_in(parameter, piece.take(data), piece)
            elif isinstance(gradient, DTensor):
                self._whole.append((piece, data, local(gradient)))
                gradient._local_tensor = piece.take(local(gradient))
                stand_in(parameter, piece.take(data), piece)
            else:
                self._whole.append((piece, data, gradient))
                parameter.grad = None
                stand_in(parameter, piece.take(data), piece)
                parameter.grad = piece.take(gradient)

    def _take_back(self) -> None:
        """Put the slices back in their places; what `_hand_over` did not touch stays bit by bit."""
        for piece, data, gradient in self._whole:
            parameter = piece.parameter
            assert piece.index is not None
            data.index_copy_(piece.dim, piece.index, local(parameter))
            if isinstance(parameter.grad, DTensor) and gradient is not None:
                parameter.grad._local_tensor = gradient
                gradient = parameter.grad
            parameter.grad = None
            stand_in(parameter, data, None)
            parameter.grad = gradient
        self._whole.clear()

    @property
    def _is_adafactor(self) -> bool:
        return type(self.optimizer).__name__ == "Adafactor"

    def _sliced_state(self) -> list[tuple[Slice, dict[str, Any], str, int]]:
        """The slices' state tensors that have slices too: which state, its key, and their dimension."""
        return [
            (piece, state, key, dim)
            for piece in self._slices
            if piece.index is not None and (state := self.optimizer.state.get(piece.parameter))
            for key, value in state.items()
            if (dim := self._dimension(piece, key, value)) is not None
        ]

    def _dimension(self, piece: Slice, key: str, value: Any) -> int | None:
        """Which dimension of a state tensor runs along the parameter's slices; None if it has none."""
        if not isinstance(value, Tensor) or value.numel() == 1:
            return None
        shape, whole = local(value).shape, self._shapes[piece]
        dim: int | None = piece.dim
        if len(shape) == len(whole) - 1 and key in _ROWS_AND_COLUMNS:
            dim = 0 if _ROWS_AND_COLUMNS[key] == piece.dim else None
        elif len(shape) == len(whole):
            if shape[piece.dim] == 1 != whole[piece.dim]:  # a mean over the slices
                dim = None
        else:
            raise ValueError(
                f"{type(self.optimizer).__name__} keeps '{key}' of shape {tuple(shape)} for weights of shape "
                f"{tuple(whole)}: Sparsity-Accelerated Training works with optimisers whose state has the "
                "weights' own shape, such as AdamW, SGD and Adafactor"
            )
        return dim


def _set(state: dict[str, Any], key: str, value: Tensor) -> None:
    if isinstance(state[key], DTensor):
        state[key]._local_tensor = value
    else:
        state[key] = value


def _rows(piece: Slice) -> Tensor:
    """The parameter's kept slices along the first dimension."""
    return local(piece.parameter).transpose(0, piece.dim)


def _correction(step: int, behind: Tensor, beta1: float, beta2: float) -> Tensor:
    """What an update of Adam is multiplied by where only `step - behind` steps went into the averages."""
    own = step - behind
    first = (1 - beta1**step) / (1 - beta1**own)
    second = (1 - beta2**step) / (1 - beta2**own)
    return first / second**0.5


def _fill_unseen(moments: Tensor) -> None:
    """Second moments of slices that never had a gradient become the mean of the others'."""
    seen = moments > 0
    if seen.any():
        moments.masked_fill_(~seen, moments[seen].mean())
