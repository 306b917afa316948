"""Experts whose matrices stay packed, in transformers' own modules.

transformers keeps the matrices of a block's experts in two parameters of three dimensions and calls them
through one interface, for every family but a few. Here the parameters give way to packed matrices, and what
the module is called through to a loop over the experts that have tokens.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from secateurs.runtime.format import ExpertsLayout
from secateurs.runtime.kernels import expand, sparse_linear
from secateurs.runtime.linear import Packed

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

    def extra_repr(self) -> str:
        experts, rows, columns = self.layout.shape
        sizes = f"experts={experts}, in_features={columns}, out_features={rows}"
        return f"{sizes}, sparsity={self.layout.sparsity:.3f}"


def hold_packed(module: nn.Module, name: str, layout: ExpertsLayout) -> SparseExperts:
    """Put packed matrices in the place of a parameter of an experts module.

    Args:
        module: of a class that `use_experts_implementation` decorates.
        name: of the parameter, of which nothing but its shape is kept, on the meta device.
        layout: of the matrices.

    Returns:
        What is now `{name}_packed` there. No conversion of transformers' takes it for the parameter's name.
    """
    experts: Any = module
    shape, dtype = experts.get_parameter(name).shape, experts.get_parameter(name).dtype
    delattr(experts, name)
    setattr(experts, name, torch.empty(shape, dtype=dtype, device="meta"))
    packed = SparseExperts(layout)
    experts.add_module(f"{name}_packed", packed)
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
