"""An MLP as data, and the calibration tokens that it is pruned on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from secateurs import ranks
from secateurs.device import multiplies_bfloat16
from secateurs.pruning.mlp.linear import Linear, Pruned
from secateurs.pruning.mlp.steps import Activation
from secateurs.pruning.record import Iterate

CHUNK = 2048
"""Tokens that are multiplied at once."""


SLICE = 128
"""Tokens that are worked on elementwise at once on a processor, whose cache then holds all in between."""


HELD_OUT = 8
"""One token in so many chooses among the iterates."""


@dataclass(frozen=True)
class MLP:
    """down(f(gate x) * up x), or down(f(up x)).

    Args:
        first: the layers that read x: gate and up, in this order; or one layer, up or both of them fused.
        down: the layer that reads the channels.
        gated: whether there is a gate.
        activation: f.
    """

    first: tuple[Linear, ...]
    down: Linear
    gated: bool
    activation: Activation

    def stacked(self) -> Linear:
        """Those of `first` as one layer, a copy: one product is faster than two and their concatenation."""
        if len(self.first) == 1:
            return self.first[0]
        weight = torch.cat([layer.weight for layer in self.first])
        if all(layer.bias is None for layer in self.first):
            return Linear(weight, None, None)
        biases = [weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in self.first]
        return Linear(weight, torch.cat(biases), None)

    def channels(self, preactivations: Tensor) -> Tensor:
        """What down reads, (tokens, channels).

        Args:
            preactivations: what `first` gives, (tokens, channels), or (tokens, 2 * channels): gate, then up.
        """
        if not self.gated:
            return self.activation(preactivations)
        gate, up = preactivations.chunk(2, dim=1)
        return self.activation(gate) * up


@dataclass(frozen=True)
class MLPSolution:
    """A pruned MLP."""

    first: tuple[Pruned, ...]
    down: Pruned
    iterates: list[Iterate]
    """Empty where no iterations were asked for."""
    kept: int
    """Which of the iterates this is."""


class Tokens(NamedTuple):
    """Calibration tokens: one tensor of each kind for every batch."""

    inputs: list[Tensor]
    """X, (tokens, hidden)."""
    targets: list[Tensor]
    """Y, (tokens, hidden)."""


def rows_of(inputs: Sequence[Tensor], *, hold_out: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of each batch to solve on, and those held out: every eighth, counted through all batches.

    Args:
        inputs: one tensor (tokens, hidden) for every batch.
        hold_out: whether any are held out.

    Raises:
        FloatingPointError: there are too few tokens to hold any out.
    """
    solving, held = [], []
    seen = 0
    for x in inputs:
        rows = torch.arange(len(x), device=x.device)
        out = (rows + seen) % HELD_OUT == HELD_OUT - 1 if hold_out else torch.zeros_like(rows).bool()
        seen += len(x)
        solving.append(rows[~out])
        held.append(rows[out])
    if hold_out and (every := int(ranks.total(seen))) < HELD_OUT:
        raise FloatingPointError(
            f"{every} calibration tokens are too few for iterations: give {HELD_OUT} or more"
        )
    return solving, held


def running_dtype(mlp: MLP, tokens: Tensor, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What tokens run through the MLP in, are multiplied in to be summed, and p is corrected in.

    bfloat16 where the model runs and is stored in it and the device is fast at it; otherwise `dtype`, as for
    the sums themselves and for the steps of z and s in any case.
    """
    dtypes = {tokens.dtype, *(layer.weight.dtype for layer in (*mlp.first, mlp.down))}
    return torch.bfloat16 if dtypes == {torch.bfloat16} and multiplies_bfloat16(device) else dtype


def squares(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Their sum, in this dtype, by slices that are converted in the cache. (On a processor `vector_norm` adds
    them up one by one, and loses some.)"""
    return torch.stack([part.to(dtype).square().sum() for part in slices(tensor)]).sum()


def slices(tensor: Tensor) -> tuple[Tensor, ...]:
    """Rows of it that are to be worked on at once, elementwise."""
    return tensor.split(SLICE if tensor.device.type == "cpu" else CHUNK // 4)
