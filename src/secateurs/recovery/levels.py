"""A rounded model's levels, held through recovery: what is trained of its matrices is their scales.

The weights of a group stay in the proportions of their levels. After every optimiser step they are those of
`levels * scale` that are nearest to where the step led, and gradients are projected in the same way: gradient
descent on the scales, which is what the end-to-end phase of EfficientQAT trains (Chen et al., arXiv
2407.11062), in the terms of the weights, so that one learning rate suits them and all else.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from secateurs.runtime.format import Grid
from secateurs.runtime.packable import Packable, packables, traced_packables
from secateurs.values import SCALES, Values

ROUNDED = 2**-8
"""By how much bfloat16 and float16 may change a number."""


def homes_of(skeleton: PreTrainedModel, grids: Mapping[str, Grid]) -> dict[str, Packable]:
    """What is rounded, as matrices, by the names of the parameters.

    Of what cannot be packed the levels are of no use: it is left out.

    Args:
        skeleton: as `checkpoint.names.skeleton_of` gives it.
        grids: by parameter, its grid, and its scales (..., rows, groups).

    Raises:
        ValueError: there are scales of what the model does not have, or has in another shape.
    """
    if not grids:
        return {}
    if strangers := grids.keys() - skeleton.state_dict().keys():
        raise ValueError(
            f"there are scales of '{min(strangers)}', which the model does not have: delete '{SCALES}' in "
            "its folder to do without"
        )
    known = packables(skeleton) | traced_packables(skeleton)
    homes = {one.parameter: one for one in known.values() if one.parameter in grids}
    for name, home in homes.items():
        values, scales = grids[name]
        *outer, columns = home.shape
        if scales.shape != (*outer, values.groups(columns)):
            raise ValueError(
                f"the scales of '{name}' are {tuple(scales.shape)}, which does not suit {home.shape}: delete "
                f"'{SCALES}' in the model's folder to do without"
            )
    return homes


class Levels:
    """Of the parameters of a model that lie on grids.

    Args:
        model: the rounded model, without adapters.
        grids: by parameter, its grid, and its scales (..., rows, groups).
        homes: of these, see `homes_of`. One whose weights are not on its grid any more is left out: it is
            like any other.
    """

    def __init__(self, model: nn.Module, grids: Mapping[str, Grid], homes: Mapping[str, Packable]) -> None:
        parameters = dict(model.named_parameters())
        held = {name: _Held(parameters[name], home, *grids[name]) for name, home in homes.items()}
        self._held = {name: one for name, one in held.items() if one.is_on_grid()}
        self._hooks: list[Any] = []

    @property
    def count(self) -> int:
        """Weights whose levels are held."""
        return sum(held.parameter.numel() for held in self._held.values())

    def attach(self, optimizer: Optimizer) -> None:
        """Hold the levels through every step of an optimiser, torch's or accelerate's wrapping of one."""
        inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._hooks.append(inner.register_step_post_hook(lambda *_: self.apply()))
        for held in self._held.values():
            hook = partial(_project_gradient, held)
            self._hooks.append(held.parameter.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Let go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def apply(self) -> None:
        """Bring weights back to their levels, at the scales that fit them best."""
        for held in self._held.values():
            held.project(held.parameter)

    @torch.no_grad()
    def settle(self) -> dict[str, Grid]:
        """Bring weights to their levels at scales as they are stored.

        Returns:
            The grids of all, with these scales, bfloat16.
        """
        return {name: (held.values, held.settle()) for name, held in self._held.items()}


class _Held:
    """One parameter."""

    def __init__(self, parameter: nn.Parameter, packable: Packable, values: Values, scales: Tensor) -> None:
        self.parameter, self.values = parameter, values
        self._packable, self._scales = packable, scales.to(parameter)
        matrices = self._matrices(parameter)
        levels = values.encode(matrices, self._scales).to(torch.int16).mul_(values.step).add_(values.lowest)
        # Where a mask has zeros, they are no level's. No level is below -128: of 8 bits all are whole.
        self._levels = levels.mul_(matrices != 0).to(torch.int8)

    def is_on_grid(self) -> bool:
        """Whether the weights are `levels * scale`, but for how their dtype rounds that."""
        exact = self._times_levels(self._scales)
        return torch.allclose(exact, self._matrices(self.parameter), rtol=ROUNDED, atol=1e-7)

    def project(self, tensor: Tensor) -> None:
        """Replace a tensor of the parameter's shape by its nearest of `levels * scale`."""
        matrices = self._matrices(tensor)
        matrices.copy_(self._times_levels(self._fitted(matrices)))

    def settle(self) -> Tensor:
        """Bring the parameter to scales in bfloat16, and return them."""
        matrices = self._matrices(self.parameter)
        scales = self._fitted(matrices).bfloat16()
        matrices.copy_(self._times_levels(scales.float()))
        return scales.cpu()

    def _fitted(self, matrices: Tensor) -> Tensor:
        """The scale of each group by least squares; of one whose levels are all 0, what it was."""
        levels = self._grouped(self._levels.to(matrices.device)).float()
        square = levels.square().sum(dim=-1)
        product = levels.mul_(self._grouped(matrices)).sum(dim=-1)
        before = self._scales.to(product)
        return torch.where(square > 0, product / square.clamp_min(1), before)

    def _times_levels(self, scales: Tensor) -> Tensor:
        self._levels = self._levels.to(scales.device)
        # A scale may be negative: +0 for its zeros all the same.
        return self.values.spread(scales, self._levels.shape[-1]).mul_(self._levels).add_(0.0)

    def _grouped(self, matrices: Tensor) -> Tensor:
        """(..., rows, groups, columns of a group); the last group is filled up with zeros."""
        missing = -matrices.shape[-1] % self.values.group
        return nn.functional.pad(matrices, (0, missing)).unflatten(-1, (-1, self.values.group))

    def _matrices(self, tensor: Tensor) -> Tensor:
        """(..., out, in): a view."""
        return self._packable.matrices_of(tensor.detach())


def _project_gradient(held: _Held, parameter: nn.Parameter) -> None:
    if parameter.grad is not None:
        held.project(parameter.grad)
