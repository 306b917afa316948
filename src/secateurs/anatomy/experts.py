"""Experts one by one: transformers keeps those of a block in parameters of three dimensions.

Every current family calls them through one interface (`ALL_EXPERTS_FUNCTIONS`), with the tokens, the experts
that each goes to and what their results count, so that one loop serves them all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ONE_BY_ONE = "secateurs_one_by_one"
"""What the loop over experts is registered as."""


def run_experts(
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
    experts = module.down_proj.shape[0]
    for expert in range(experts):
        token, place = torch.where(index == expert)
        if not len(token):
            continue
        channels = linear(expert, "gate_up_proj" if module.has_gate else "up_proj", hidden[token])
        channels = module._apply_gate(channels) if module.has_gate else module.act_fn(channels)
        given = linear(expert, "down_proj", channels)
        if module.has_post_expert_norm:
            given = module.post_expert_norm(given)
        result = result.index_add(0, token, (given * weights[token, place, None]).to(result.dtype))
    return result


def expert_linear(module: Any, expert: int, name: str, given: Tensor) -> Tensor:
    """The product with one expert's matrix."""
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return functional.linear(given, weight.T if module.is_transposed else weight, bias)


def one_by_one(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """An implementation of experts in which each expert's products are functions of torch's by themselves."""
    return run_experts(module, hidden, index, weights, partial(expert_linear, module))


ALL_EXPERTS_FUNCTIONS.register(ONE_BY_ONE, one_by_one)


def use_experts_one_by_one(model: nn.Module) -> None:
    """Let a model's experts run by `one_by_one` from here on."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._experts_implementation_internal = ONE_BY_ONE
