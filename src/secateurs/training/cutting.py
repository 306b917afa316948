"""Run blocks on a subset of their heads and channels, forward and backward, for real.

A step that omits neurons uses some rows of the layers that write them (q, k, v, gate, up) and the same
columns of the layers that read them (o, down). There are two ways to run on those alone, and neither replaces
a model's code or a key of its `state_dict`:

- *In place*, where one process holds whole parameters: the slices of each weight are put in another order,
  kept ones first, and the parameter becomes a view of those. Until the set changes nothing is gathered or
  copied: forward, backward, gradients and the optimiser all run at the small size, and there is no second
  copy in memory. Slices that are columns are stored transposed, so that the view is dense and fused
  optimisers take it.
- *Gathered*, where something else owns the parameters and counts on their shapes (DDP's buckets, FSDP2's and
  ZeRO's shards): every forward pass gathers the kept slices, and backward writes their gradient into zeros.

What a block's code reads its head counts from (`units.COUNTS`) is replaced for as long as the block is small,
so also while activation checkpointing recomputes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from secateurs.training.units import KINDS, Cut, Kind, Units

Kept = Sequence[dict[Kind, Tensor | None]]
"""For each block and kind the units that run, as a mask (groups, size) on the CPU; None means all of them."""


def positions(kept: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The slices that belong to kept units, and the others, both ascending; unit -1 is always kept."""
    keeps = torch.cat([kept.flatten(), kept.new_ones(1)])[unit]
    return keeps.nonzero().flatten(), (~keeps).nonzero().flatten()


@dataclass(eq=False)
class Slice:
    """A parameter whose slices along one dimension belong to units."""

    parameter: nn.Parameter
    dim: int
    unit: Tensor
    """(size of the dimension,): the unit that each slice belongs to, or -1 if it is always kept. Of a sharded
    parameter only what this rank holds."""
    block: int
    kind: Kind
    restore: Callable[[], None]
    """Makes this parameter and all others of the model whole."""
    index: Tensor | None = None
    """The kept slices, ascending; None if none is omitted."""
    order: Tensor | None = None
    """The kept slices, then the others."""

    def choose(self, kept: Tensor | None) -> None:
        """Set what is kept from a mask of the block's units; None keeps all."""
        self.index = self.order = None
        if kept is None:
            return
        inside, outside = positions(kept, self.unit)
        if len(outside):
            self.order = torch.cat([inside, outside]).to(self.parameter.device)
            self.index = self.order[: len(inside)]

    def take(self, whole: Tensor) -> Tensor:
        """A copy of the kept slices, in the layout of `Reordered.part`."""
        assert self.index is not None
        part = whole.index_select(self.dim, self.index)
        return part.transpose(0, self.dim).contiguous().transpose(0, self.dim)


class Reordered:
    """A tensor whose slices are stored kept ones first, so that a view of those stands in for it.

    Args:
        whole: (..., n, ...) the tensor; it may be freed afterwards.
        dim: the dimension of its slices.
        order: (n,) the slices in their new order.
        kept: how many come first.
    """

    def __init__(self, whole: Tensor, dim: int, order: Tensor, kept: int) -> None:
        self.dim, self.order, self.kept = dim, order, kept
        # Transposed first: selecting columns that are not contiguous is several times slower.
        self.stored = whole.transpose(0, dim).contiguous().index_select(0, order)

    @property
    def part(self) -> Tensor:
        """The kept slices: a dense view."""
        return self.stored[: self.kept].transpose(0, self.dim)

    def whole(self, part: Tensor) -> Tensor:
        """The tensor in its own order again, with `part` in the place of the kept slices."""
        if part.data_ptr() != self.stored.data_ptr():  # replaced rather than updated
            self.part.copy_(part)
        return self.stored.index_select(0, self.order.argsort()).transpose(0, self.dim).contiguous()


class Gather(torch.autograd.Function):
    """Slices of a parameter, whose gradient is that of the whole parameter, zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.shape = dim, whole.shape
        return whole.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(ctx.dim, index, gradient), None, None


_standing_for: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The `Slice` of each parameter that is small at the moment, in place or for an optimiser's step."""


def kept_part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """What of a tensor shaped like the whole parameter belongs to the part that stands for it now."""
    piece = _standing_for.get(parameter)
    return whole if piece is None else piece.take(whole)


def make_whole(parameter: nn.Parameter) -> None:
    """Make a parameter whole that a part stands for in place, with all of its model, until the next step."""
    piece = _standing_for.get(parameter)
    if piece is not None:
        piece.restore()


def whole_gradient(parameter: nn.Parameter) -> Tensor:
    """A copy of a parameter's gradient in the shape of the whole parameter, zero where it is omitted."""
    assert parameter.grad is not None
    piece = _standing_for.get(parameter)
    if piece is None:
        return parameter.grad.clone()
    assert piece.index is not None
    shape = list(parameter.shape)
    shape[piece.dim] = len(piece.unit)
    return parameter.grad.new_zeros(shape).index_copy_(piece.dim, piece.index, parameter.grad)


def shape_of(parameter: Tensor) -> torch.Size:
    """A parameter's shape in the plain model: under ZeRO-3 it is empty between passes."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def gathered(parameter: Tensor, *, written: bool = False) -> AbstractContextManager[None]:
    """A parameter that ZeRO-3 has in parts is whole within: a collective call. What the first process writes
    into it stays if it says so."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    whole: AbstractContextManager[None] = zero.GatheredParameters(parameter, 0 if written else None)
    return whole


def trained_of(tensor: Tensor) -> Tensor:
    """`whole_of` a tensor; of what DeepSpeed trains in 16 bits the float32 values that it steps on."""
    by_deepspeed = hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")
    if not by_deepspeed or not tensor.requires_grad or tensor.dtype == torch.float32:
        return whole_of(tensor)
    from deepspeed.utils import safe_get_full_fp32_param

    stepped_on: Tensor = safe_get_full_fp32_param(tensor)
    return stepped_on.detach()


def whole_of(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part, without history: a collective call if it does."""
    if tensor.shape != shape_of(tensor):
        with gathered(tensor):
            return tensor.detach().clone()
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def stand_in(parameter: nn.Parameter, data: Tensor, piece: Slice | None) -> None:
    """Give a parameter other local data; `piece` says which slices those are, None that they are all."""
    if isinstance(parameter, DTensor):
        parameter._local_tensor = data
    else:
        parameter.data = data
    if piece is None:
        _standing_for.pop(parameter, None)
    else:
        _standing_for[parameter] = piece


@dataclass(eq=False)
class _Layer:
    """A linear layer of which outputs or inputs belong to units."""

    module: nn.Linear | Conv1D
    outputs: bool
    unit: Tensor
    """(outputs or inputs,): as in `Slice`."""
    slices: list[Slice]
    """Of its weight, and of its bias if its outputs are sliced and it has one."""


@dataclass(eq=False)
class Block:
    """A block of the model, and what can be sliced in it."""

    module: nn.Module
    cuts: Mapping[Kind, Cut]
    """Of the kinds that it has units of."""
    layers: dict[Kind, list[_Layer]]
    readers: dict[Kind, nn.Module]
    """The layer (o, down) whose input is what the units hand on."""

    @property
    def units(self) -> dict[Kind, Units]:
        """Of the kinds that it has."""
        return {kind: cut.units for kind, cut in self.cuts.items()}

    def reader(self, kind: Kind) -> _Layer:
        """The same without adapters."""
        return next(layer for layer in self.layers[kind] if not layer.outputs)


class Cutting:
    """Blocks that run on a subset of their units.

    Args:
        blocks: the blocks, with PEFT's LoRA or without.
        cuts: for each block, what can be cut of it.
        where: the path of the list of blocks, for messages.
        in_place: make the parameters small, rather than gather from them in each forward pass.

    Raises:
        ValueError: a layer is none that can be sliced (quantised, partitioned, or with adapters other than
            LoRA).
    """

    def __init__(
        self, blocks: Sequence[nn.Module], cuts: Sequence[Mapping[Kind, Cut]], where: str, *, in_place: bool
    ) -> None:
        self.in_place = in_place
        self.blocks = [
            self._block(module, cut, f"{where}.{number}", number)
            for number, (module, cut) in enumerate(zip(blocks, cuts, strict=True))
        ]
        self.slices = [
            piece
            for block in self.blocks
            for layers in block.layers.values()
            for layer in layers
            for piece in layer.slices
        ]
        self.engaged = False
        self.kept: Kept = [dict.fromkeys(KINDS) for _ in self.blocks]
        self._replaced: list[tuple[Any, str, Any]] = []  # owner, attribute, its own value before
        self._reordered: list[tuple[Slice, Reordered]] = []

    def _block(self, module: nn.Module, cuts: Mapping[Kind, Cut], where: str, number: int) -> Block:
        block = Block(module, cuts, {kind: [] for kind in cuts}, {})
        for kind, cut in cuts.items():
            for name, unit in (*cut.writers.items(), (cut.reader, cut.inputs)):
                layer, outputs = module.get_submodule(name), name != cut.reader
                if not outputs:
                    block.readers[kind] = layer
                for linear in _linears(layer, f"{where}.{name}", outputs):
                    parameters = _sliced_parameters(linear, f"{where}.{name}", outputs, unit)
                    slices = [
                        Slice(
                            p,
                            dim,
                            _local_units(p, dim, unit, f"{where}.{name}"),
                            number,
                            kind,
                            self.disengage,
                        )
                        for p, dim in parameters
                    ]
                    block.layers[kind].append(_Layer(linear, outputs, unit, slices))
        return block

    def choose(self, kept: Kept) -> None:
        """Set which units run from the next `engage` on. The model must be whole."""
        assert not self.engaged
        self.kept = kept
        for piece in self.slices:
            piece.choose(kept[piece.block][piece.kind])

    def engage(self) -> None:
        """Run on the chosen units alone."""
        if self.engaged:
            return
        self.engaged = True
        for block, kept in zip(self.blocks, self.kept, strict=True):
            for kind, cut in block.cuts.items():
                mask = kept[kind]
                if mask is None:
                    continue
                for path, count in cut.counted(int(mask.sum())).items():
                    self._set_count(block.module, path, count)
                for layer in block.layers[kind]:
                    if self.in_place:
                        self._shrink(layer)
                    else:
                        self._gather(layer, mask)
        torch.clear_autocast_cache()  # of weights in their old shapes

    def disengage(self) -> None:
        """Make the model whole again: its code, shapes and `state_dict` are those of the plain model."""
        if not self.engaged:
            return
        self.engaged = False
        for owner, attribute, value in reversed(self._replaced):
            if value is _ABSENT:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, value)
        self._replaced.clear()
        for piece, reordered in self._reordered:
            parameter, gradient = piece.parameter, piece.parameter.grad
            _reshape(parameter, reordered.whole(parameter.data), None)
            if gradient is not None:
                assert piece.index is not None
                parameter.grad = torch.zeros_like(parameter).index_copy_(
                    piece.dim, piece.index, gradient.contiguous()
                )
        self._reordered.clear()
        torch.clear_autocast_cache()

    def _set_count(self, block: nn.Module, path: str, count: int) -> None:
        """Tell a block's code how many heads it has now."""
        *parents, attribute = path.split(".")
        owner: Any = block
        for parent in parents:
            child = getattr(owner, parent)
            if isinstance(child, PretrainedConfig):  # all blocks share it: this one gets its own
                child = copy.copy(child)
                self._replace(owner, parent, child)
            owner = child
        if isinstance(owner, PretrainedConfig):
            setattr(owner, attribute, count)
        else:
            self._replace(owner, attribute, count)

    def _shrink(self, layer: _Layer) -> None:
        for piece in layer.slices:
            if piece.order is None or piece.index is None:
                continue
            parameter, gradient = piece.parameter, piece.parameter.grad
            reordered = Reordered(parameter.data, piece.dim, piece.order, len(piece.index))
            self._reordered.append((piece, reordered))
            _reshape(parameter, reordered.part, piece)
            parameter.grad = None if gradient is None else piece.take(gradient)
        if isinstance(layer.module, Conv1D) and layer.outputs:
            self._replace(layer.module, "nf", layer.module.weight.shape[1])

    def _gather(self, layer: _Layer, mask: Tensor) -> None:
        weight, *bias = layer.slices
        # Not the slices' own indices: those of a sharded parameter count within the shard.
        inside, outside = positions(mask, layer.unit)
        if not len(outside):
            return
        index = inside.to(weight.parameter.device)
        forward = partial(_gathered_forward, layer.module, weight.dim, index, bool(bias))
        self._replace(layer.module, "forward", forward)

    def _replace(self, owner: Any, attribute: str, value: Any) -> None:
        self._replaced.append((owner, attribute, vars(owner).get(attribute, _ABSENT)))
        setattr(owner, attribute, value)


_ABSENT = object()


def _gathered_forward(
    layer: nn.Linear | Conv1D, dim: int, index: Tensor, slice_bias: bool, x: Tensor
) -> Tensor:
    weight = running_weight(layer)
    bias = Gather.apply(layer.bias, 0, index) if slice_bias else layer.bias
    return functional.linear(x, weight.T if isinstance(layer, Conv1D) else weight, bias)


def running_weight(layer: Any) -> Tensor:
    """What of a linear layer's weight its forward pass uses now: that of the neurons that run."""
    forward = vars(layer).get("forward")
    if isinstance(forward, partial) and forward.func is _gathered_forward:
        _, dim, index, _ = forward.args
        gathered: Tensor = Gather.apply(layer.weight, dim, index)
        return gathered
    weight: Tensor = layer.weight
    return weight


def _reshape(parameter: nn.Parameter, data: Tensor, piece: Slice | None) -> None:
    """Give a leaf of autograd data of another shape."""
    parameter.grad = None
    # A graph that is still referenced keeps the leaf's accumulator alive, which insists on the old shape and
    # is dropped when the dtype changes.
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    stand_in(parameter, data, piece)


def _linears(layer: nn.Module, where: str, outputs: bool) -> list[nn.Linear | Conv1D]:
    """The plain linear layers to slice: this one, or of a LoRA layer the base and the adapters' near side."""
    parts: list[Any] = [layer]
    if hasattr(layer, "base_layer"):
        adapters: Any = getattr(layer, "lora_B" if outputs else "lora_A", None)
        if adapters is None or len(getattr(layer, "lora_magnitude_vector", ())):
            raise ValueError(
                f"cannot omit parts of '{where}': of adapters only plain LoRA is supported: leave out DoRA "
                "and others, or sparse steps"
            )
        parts = [layer.base_layer, *adapters.values()]
    for part in parts:
        if not isinstance(part, nn.Linear | Conv1D):
            raise ValueError(f"cannot omit parts of '{where}': {type(part).__name__} is no linear layer")
    return parts


def _sliced_parameters(
    linear: nn.Linear | Conv1D, where: str, outputs: bool, unit: Tensor
) -> list[tuple[nn.Parameter, int]]:
    """A layer's parameters that have slices, each with their dimension."""
    dim = int(isinstance(linear, Conv1D) == outputs)  # Conv1D stores (in, out)
    weight: Any = linear.weight
    if not weight.is_floating_point() or len(shape_of(weight)) != 2 or shape_of(weight)[dim] != len(unit):
        raise ValueError(
            f"cannot omit parts of '{where}': its weights are quantised or partitioned: load them as "
            "they are (bfloat16, float32), and shard by FSDP2 or ZeRO if at all"
        )
    parameters = [(weight, dim)]
    if outputs and linear.bias is not None:
        parameters.append((linear.bias, 0))
    return parameters


def _local_units(parameter: nn.Parameter, dim: int, unit: Tensor, where: str) -> Tensor:
    if not isinstance(parameter, DTensor) or parameter.placements == (Replicate(),):
        return unit
    if any(not isinstance(p, Replicate) and p != Shard(0) for p in parameter.placements):
        raise ValueError(f"cannot omit parts of '{where}': its weights are sharded, and not along rows")
    if dim != 0:
        return unit
    shape, start = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return unit[start[0] : start[0] + shape[0]]
