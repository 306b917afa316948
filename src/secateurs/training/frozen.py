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

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from secateurs.training.cutting import Reordered, Slice, local, stand_in
from secateurs.training.omission import Omission
from secateurs.training.units import Kind

Counts = Sequence[dict[Kind, Tensor]]
"""For each block, and kind that it has units of, the optimiser steps that each has run (groups, size)."""

_ROWS_AND_COLUMNS = {"exp_avg_sq_row": 0, "exp_avg_sq_col": 1}
"""The dimension that transformers' Adafactor keeps in each of its factors."""

_SECOND_MOMENTS = {*_ROWS_AND_COLUMNS, "exp_avg_sq", "row_var", "col_var", "variance"}
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
        # By device and betas: slices, which positions of what runs of them are late, and by how many steps.
        self._late: defaultdict[Any, list[tuple[Slice, Tensor, Tensor]]] = defaultdict(list)
        self._before: dict[Slice, Tensor] = {}
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
            elif piece.index is not None and small.shape[dim] != len(piece.unit):
                # Made by a step, so for the kept slices alone.
                shape = (*small.shape[:dim], len(piece.unit), *small.shape[dim + 1 :])
                whole = torch.zeros(shape, dtype=small.dtype, device=small.device)
                _set(state, key, whole.index_copy_(dim, piece.index, small))
        self._state.clear()

    def choose(self, counts: Counts) -> None:
        """Take note of a new set, while the state is whole.

        Args:
            counts: the steps of each unit, to find those to run that are behind the optimiser's own.
        """
        self._late.clear()
        if isinstance(self.optimizer, torch.optim.Adam):  # AdamW is one
            for piece in self._slices:
                own = torch.cat([counts[piece.block][piece.kind].flatten(), torch.tensor([self.steps])])
                behind = self.steps - own[piece.unit]
                if piece.index is not None:
                    behind = behind[piece.index.cpu()]
                late = behind.nonzero().flatten()
                if len(late):
                    device = piece.parameter.device
                    betas = tuple(self._groups[id(piece.parameter)]["betas"])  # a list after some checkpoints
                    group = self._late[device, betas]
                    group.append((piece, late.to(device), behind[late].to(device, torch.float32)))
        elif type(self.optimizer).__name__ == "Adafactor":
            for piece, state, key, dim in self._sliced_state():
                if key in _SECOND_MOMENTS:
                    _fill_unseen(local(state[key]), dim, piece.index)

    def _before_step(self) -> None:
        self.omission.engage()  # somebody may have evaluated since the backward pass
        if not self.omission.in_place:
            self._hand_over()
        for piece, state, key, dim in self._sliced_state():
            value = local(state[key])
            if piece.index is None or (piece, key) in self._state or value.shape[dim] != len(piece.unit):
                continue
            assert piece.order is not None
            reordered = Reordered(value, dim, piece.order, len(piece.index))
            self._state[piece, key] = reordered
            _set(state, key, reordered.part)
        self._before = {
            piece: _rows(piece).index_select(0, late)
            for pieces in self._late.values()
            for piece, late, _ in pieces
            if piece.parameter.grad is not None
        }

    def _after_step(self) -> None:
        self.steps += 1
        for (_, betas), pieces in self._late.items():
            # Of all slices at once: there are hundreds of them, and this is a dozen of operations.
            behind = torch.cat([steps for _, _, steps in pieces])
            scales = correction(self.steps, behind, *betas).split([len(late) for _, late, _ in pieces])
            for (piece, late, _), scale in zip(pieces, scales, strict=True):
                if piece in self._before:
                    self._rescale(piece, late, self._before[piece], scale)
        self._before = {}
        self._take_back()

    def _rescale(self, piece: Slice, late: Tensor, before: Tensor, scale: Tensor) -> None:
        group = self._groups[id(piece.parameter)]
        if group["decoupled_weight_decay"]:
            before *= 1 - group["lr"] * group["weight_decay"]
        rows = _rows(piece)
        scale = scale.to(before.dtype).view(-1, *[1] * (before.dim() - 1))
        rows.index_copy_(0, late, torch.lerp(before, rows.index_select(0, late), scale))

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
            data.index_copy_(piece.dim, piece.index, local(parameter).contiguous())
            if isinstance(parameter.grad, DTensor) and gradient is not None:
                parameter.grad._local_tensor = gradient
                gradient = parameter.grad
            parameter.grad = None
            stand_in(parameter, data, None)
            parameter.grad = gradient
        self._whole.clear()

    def _sliced_state(self) -> list[tuple[Slice, dict[str, Any], str, int]]:
        """The slices' state tensors that have slices too: which state, its key, and their dimension."""
        return [
            (piece, state, key, dim)
            for piece in self._slices
            if (state := self.optimizer.state.get(piece.parameter))
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
        elif piece.index is None:
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


def correction(step: int, behind: Tensor, beta1: float, beta2: float) -> Tensor:
    """What an update of Adam is multiplied by where only `step - behind` steps went into the averages."""
    own = step - behind
    first = (1 - beta1**step) / (1 - beta1**own)
    second = (1 - beta2**step) / (1 - beta2**own)
    return first / second**0.5


def _fill_unseen(moments: Tensor, dim: int, index: Tensor | None) -> None:
    """Second moments of slices to run that never had a gradient become the mean of the others'."""
    running = moments if index is None else moments.index_select(dim, index)
    seen = running > 0
    if seen.any():
        running = torch.where(seen, running, running[seen].mean())
        moments.copy_(running) if index is None else moments.index_copy_(dim, index, running)
