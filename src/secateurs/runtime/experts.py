"""Experts whose matrices stay packed, in transformers' own modules.

transformers keeps the matrices of a block's experts in parameters of three dimensions. Here these give way to
packed matrices, and to a tensor without content that stands for them: what the module's code multiplies by a
view of it is multiplied by the packed matrix there. For every family but a few, transformers calls experts
through one interface; what that calls gives way to a loop over the experts that have tokens, which is faster
than the module's own code.
"""

from collections.abc import Callable
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from secateurs.anatomy.products import Parameters, as_multiplication
from secateurs.runtime.kernels import expand, sparse_linear
from secateurs.runtime.layout import ExpertsLayout
from secateurs.runtime.linear import Packed
from secateurs.runtime.packable import is_experts

PACKED = "secateurs_packed"
"""What the loop over packed experts is registered as."""


class SparseExperts(Packed):
    """The matrices of a block's experts for one product, frozen, each as packed bytes.

    Args:
        layout: of the matrices; rows are the output features.
    """

    layout: ExpertsLayout

    def __init__(self, layout: ExpertsLayout) -> None:
        super().__init__()
        self.hold(layout)

    def dense_weight(self, expert: int) -> Tensor:
        """W (out, in) of one expert."""
        layout = self.layout.layouts[expert]
        part = self.layout.part(self.weight, expert)
        return expand(part, self.offsets[expert], layout, 0, layout.rows)

    def linear(self, expert: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias with the matrix W of one expert."""
        part = self.layout.part(self.weight, expert)
        return sparse_linear(x, part, self.offsets[expert], bias, self.layout.layouts[expert])

    def all_at_once(self, x: Tensor) -> Tensor:
        """x W^T of every expert on tokens of its own: (experts, tokens, in) to (experts, tokens, out).

        What is not routed to an expert comes to it as zeros (in Llama 4, say), and is left out.
        """
        result = x.new_zeros(*x.shape[:-1], self.layout.shape[1])
        routed = x.any(-1)
        for expert in routed.any(-1).nonzero().flatten().tolist():
            result[expert, routed[expert]] = self.linear(expert, x[expert, routed[expert]], None)
        return result

    def extra_repr(self) -> str:
        experts, rows, columns = self.layout.shape
        sizes = f"experts={experts}, in_features={columns}, out_features={rows}"
        return f"{sizes}, sparsity={self.layout.sparsity:.3f}"


class StandIn(Tensor):
    """In the place of a parameter whose matrices are packed: of its shape, on the meta device.

    However a model's code comes by one expert's matrix, or by all of them, it is a view of the parameter, and
    where a view lies says which it is.
    """

    packed: SparseExperts
    parameters: Parameters
    """The one that it and its views are of."""

    @classmethod
    def of(cls, packed: SparseExperts, shape: torch.Size, dtype: torch.dtype) -> "StandIn":
        empty = torch.empty(shape, dtype=dtype, device="meta")
        stand_in = empty.as_subclass(cls)
        stand_in.packed, stand_in.parameters = packed, Parameters({"": empty})
        return stand_in

    def _view(self, tensor: Tensor) -> "StandIn":
        view = tensor.as_subclass(StandIn)
        view.packed, view.parameters = self.packed, self.parameters
        return view

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        own = next(tensor for tensor in tensors if isinstance(tensor, cls))
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and not args[1].ndim:
            args, tensors = (args[0], int(args[1])), [own]  # one expert: a view
        with torch._C.DisableTorchFunctionSubclass():
            if func == Tensor.device.__get__:
                return own.packed.weight.device
            product = as_multiplication(func, args, kwargs)
            place = None if product is None else own.parameters.place(product.weight)
            if product is None or place is None:
                if len(tensors) > 1:  # or torch might compute something of what is not there
                    raise ValueError(f"packed experts cannot be used in {func.__name__}")
                return pytree.tree_map_only(Tensor, own._view, func(*args, **kwargs))
        used, shape = tuple(product.weight.shape[-2:]), own.packed.layout.shape
        if used != shape[1:]:
            raise ValueError(f"packed experts of {shape} are multiplied by as if each were {used}")
        if product.weight.ndim == 3:
            return own.packed.all_at_once(product.given.expand(shape[0], -1, -1))
        return own.packed.linear(place.expert or 0, product.given, product.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StandIn":
        return StandIn.of(deepcopy(self.packed, memo), self.shape, self.dtype)


def hold_packed(module: nn.Module, name: str, layout: ExpertsLayout) -> SparseExperts:
    """Put packed matrices in the place of a parameter of an experts module.

    Args:
        module: holds the parameter, which a `StandIn` replaces.
        name: of the parameter.
        layout: of the matrices.

    Returns:
        What is now `{name}_packed` there. No conversion of transformers' takes it for the parameter's name.
    """
    experts: Any = module
    shape, dtype = experts.get_parameter(name).shape, experts.get_parameter(name).dtype
    delattr(experts, name)
    packed = SparseExperts(layout)
    experts.add_module(f"{name}_packed", packed)
    setattr(experts, name, StandIn.of(packed, shape, dtype))
    if not is_experts(module):
        return packed
    experts.config = copy(experts.config)  # this module's own: it has one implementation, whoever sets others
    experts.config._experts_implementation_internal = PACKED
    return packed


def _run(
    module: Any, hidden: Tensor, index: Tensor, weights: Tensor, linear: Callable[..., Tensor]
) -> Tensor:
    """What transformers' experts give, expert by expert.

    Args:
        module: the experts, of a class that `use_experts_implementation` decorates.
        hidden: (tokens, in).
        index: (tokens, chosen) the experts that each token goes to.
        weights: (tokens, chosen) what their results count.
        linear: of an expert's number, the name of its parameter in the module, and its inputs.
    """
    result = torch.zeros_like(hidden)
    for expert in index[index < module.down_proj.shape[0]].unique().tolist():
        token, place = torch.where(index == expert)
        channels = linear(expert, "gate_up_proj" if module.has_gate else "up_proj", hidden[token])
        channels = module._apply_gate(channels) if module.has_gate else module.act_fn(channels)
        given = linear(expert, "down_proj", channels)
        if module.has_post_expert_norm:
            given = module.post_expert_norm(given)
        result = result.index_add(0, token, (given * weights[token, place, None]).to(result.dtype))
    return result


def _dense_linear(module: Any, expert: int, name: str, given: Tensor) -> Tensor:
    """The product with one expert's matrix."""
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return functional.linear(given, weight.T if module.is_transposed else weight, bias)


def _linear(module: Any, expert: int, name: str, given: Tensor) -> Tensor:
    """The product with one expert's matrix, packed or not."""
    packed = getattr(module, f"{name}_packed", None)
    if packed is None:
        return _dense_linear(module, expert, name, given)
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    result: Tensor = packed.linear(expert, given, bias)
    return result


def _run_packed(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return _run(module, hidden, index, weights, partial(_linear, module))


ALL_EXPERTS_FUNCTIONS.register(PACKED, _run_packed)
