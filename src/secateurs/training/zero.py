"""DeepSpeed's ZeRO: parameters that are empty between passes, an optimiser that sees only parts of them.

The optimiser steps on flat tensors, in which every process has its parts of the parameters one after another:
under ZeRO-3 a share of each, under ZeRO-1 and 2 a share of their row. So nothing can be handed to it
that is smaller; what is omitted is put back after the step, before the parameters are made of the flat
tensors. That suits optimisers that go weight by weight, as Adam and SGD do.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from secateurs.training.cutting import shape_of
from secateurs.training.frozen import Counts, correction
from secateurs.training.omission import Omission
from secateurs.training.units import Kind


def stepping(optimizer: Any) -> Optimizer:
    """The optimiser that makes the steps, out of accelerate's wrapping and of DeepSpeed's."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    inner = inner.optimizer if zero_of(optimizer) else inner
    return cast(Optimizer, inner)


def zero_of(optimizer: Any) -> Any:
    """DeepSpeed's optimiser by ZeRO out of accelerate's wrapping; None if it is none.

    Raises:
        ValueError: DeepSpeed has the optimiser, but not by ZeRO, on disk, or makes some steps elsewhere.
    """
    outer = getattr(optimizer, "optimizer", optimizer)
    if not type(outer).__module__.startswith("deepspeed.runtime"):
        return None
    if not any(hasattr(outer, name) for name in ("fp32_partitioned_groups_flat", "_link_all_hp_params")):
        raise ValueError(f"{type(outer).__name__} is not by ZeRO: choose its stage 1, 2 or 3")
    if getattr(outer, "swap_optimizer", False):
        raise ValueError("what the optimiser holds is on disk (nvme): offload it to cpu, or not at all")
    if getattr(outer, "backup_optimizer", None) or getattr(outer, "zenflow", False):
        raise ValueError("several optimisers make the steps: leave out zenflow and offload_optimizer's ratio")
    return outer


@dataclass(frozen=True)
class Fragment:
    """A part of a parameter, which this process's optimiser has in a flat tensor."""

    parameter: nn.Parameter
    flat: Tensor
    place: int
    """Where in the flat tensor it starts."""
    start: int
    """Where in the parameter, row by row."""
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """The part of a tensor like the flat one."""
        return flat[self.place : self.place + self.count]


def fragments_of(zero: Any, parameters: Iterable[nn.Parameter]) -> Iterator[Fragment]:
    """What this process's optimiser has of some of the parameters that it trains."""
    groups = stepping(zero).param_groups
    parameter: Any
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            index, place, most = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank(parameter.ds_process_group) * most
            count = min(most, parameter.ds_numel - start)  # the last parts are padded
            flat = zero.fp32_partitioned_groups_flat[index]
        elif (mapping := parameter._hp_mapping) is not None:
            inside, outside = mapping.lp_fragment_address, mapping.hp_fragment_address
            start, place, count = inside.start, outside.start, inside.numel
            (flat,) = groups[mapping.param_group_index]["params"]
        else:
            continue
        if count > 0:
            yield Fragment(parameter, flat, place, start, count)


class FrozenFragments:
    """Keeps an optimiser by ZeRO off what is omitted, as `FrozenOptimizer` does another.

    Args:
        zero: DeepSpeed's optimiser.
        omission: says what is omitted.
    """

    def __init__(self, zero: Any, omission: Omission) -> None:
        self.optimizer, self.omission = stepping(zero), omission
        self._first: dict[tuple[int, Kind], int] = {}  # by block and kind, the number of the first unit
        self._count = 0
        for number, block in enumerate(omission.blocks):
            for kind, units in block.units.items():
                self._first[number, kind] = self._count
                self._count += units.count
        self._units: dict[Tensor, Tensor] = {}
        """By flat tensor, of each of its weights the number of the unit, the last if it is none's: int32."""
        pieces = {piece.parameter: piece for piece in omission.slices if piece.parameter.requires_grad}
        for part in fragments_of(zero, pieces):
            piece = pieces[part.parameter]
            unit = piece.unit.where(piece.unit >= 0, self._count - self._first[piece.block, piece.kind])
            shape = shape_of(part.parameter)
            sizes = [-1 if dim == piece.dim else 1 for dim in range(len(shape))]
            rows = (unit + self._first[piece.block, piece.kind]).int().view(sizes).expand(shape)
            own = rows.flatten()[part.start : part.start + part.count].to(part.flat.device)
            if part.flat not in self._units:
                none = torch.full(part.flat.shape, self._count, dtype=torch.int32, device=part.flat.device)
                self._units[part.flat] = none
            part.of(self._units[part.flat]).copy_(own)
        self.steps = max((int(s.get("step", 0)) for s in self.optimizer.state.values()), default=0)
        """Steps that the optimiser has made."""
        self._behind = torch.zeros(self._count + 1, dtype=torch.float64)
        self._omitted = torch.zeros(self._count + 1, dtype=torch.bool)
        self._before: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._hooks = [
            self.optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            self.optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def detach(self) -> None:
        """Leave the optimiser."""
        for hook in self._hooks:
            hook.remove()

    def widen(self) -> None:
        """Its state is whole at all times."""

    def choose(self, counts: Counts) -> None:
        """Take note of a new set.

        Args:
            counts: the steps of each unit, to find those to run that are behind the optimiser's own.
        """
        for (number, kind), first in self._first.items():
            own, mask = counts[number][kind].flatten(), self.omission.kept[number][kind]
            here = slice(first, first + len(own))
            self._behind[here] = (self.steps - own).double()
            self._omitted[here] = False if mask is None else ~mask.flatten()

    @torch.no_grad()
    def _before_step(self) -> None:
        for flat, omitted in self._stepped():
            state = self.optimizer.state.get(flat, {})
            alike = {k: v[omitted] for k, v in state.items() if _is_like(v, flat)}
            self._before.append((flat.detach().clone(), alike))

    @torch.no_grad()
    def _after_step(self) -> None:
        groups = {flat: group for group in self.optimizer.param_groups for flat in group["params"]}
        for (flat, omitted), (before, alike) in zip(self._stepped(), self._before, strict=True):
            state, group = self.optimizer.state[flat], groups[flat]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.numel() > 1 and not _is_like(value, flat):
                    raise ValueError(
                        f"{type(self.optimizer).__name__} holds '{key}' otherwise than weight by weight, so "
                        "that what is omitted cannot be kept: train with AdamW or SGD"
                    )
            self.steps = max(self.steps, int(state.get("step", 0)))
            if "exp_avg_sq" in state and "betas" in group:  # Adam, whoever made it
                scales = correction(self.steps, self._behind, *group["betas"]).to(flat)
                decoupled = group.get("decoupled_weight_decay", getattr(self.optimizer, "adam_w_mode", False))
                decay = group["lr"] * group["weight_decay"] if decoupled else 0.0
                scale = scales.index_select(0, self._units[flat])
                flat.copy_(torch.lerp(before * (1 - decay), flat, scale))
            flat[omitted] = before[omitted]
            for key, value in alike.items():
                state[key][omitted] = value
        self._before.clear()

    def _stepped(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The flat tensors of the coming step, which is one group's, and what is omitted of them."""
        for group in self.optimizer.param_groups:
            for flat in group["params"]:
                if flat in self._units and flat.grad is not None:
                    yield flat, self._omitted.to(flat.device).index_select(0, self._units[flat])


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape and value.is_floating_point()
