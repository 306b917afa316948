"""Which parameters of a model may be packed: linear layers' weights, and the matrices of experts.

Linear layers, and experts that transformers calls through its interface for them, are known by their classes.
Experts in a model's own words (Llama 4, DBRX, JetMoE, LongCat) are known once the model's code has run.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from secateurs.anatomy import UnsupportedArchitectureError, anatomy_of
from secateurs.checkpoint.config import quiet
from secateurs.checkpoint.names import PACKED_EXPERTS
from secateurs.runtime.embedding import is_table

OWN_WORDS = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}
"""Linear layers whose classes write the same product in their own words."""

LEFT_OUT = "secateurs_left_out"
"""An implementation of experts that gives nothing."""


@dataclass(frozen=True)
class Packable:
    """A parameter of matrices that may be packed."""

    parameter: str
    """Its name in the dense model."""
    packed: str
    """What it is called once packed."""
    shape: tuple[int, ...]
    """(out, in), or of experts (experts, out, in)."""
    transposed: bool = False
    """The parameter has inputs before outputs, as in GPT-2 and gpt-oss."""
    flat: bool = False
    """The parameter has two dimensions, experts' rows below each other, as in DBRX."""
    by_row: bool = False
    """It is an embedding's table, of which rows are read."""
    heads: tuple[str, ...] = ()
    """Linear modules that multiply by the same parameter, where it is an embedding's."""

    @property
    def count(self) -> int:
        """How many matrices it holds."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def matrices_of(self, parameter: Tensor) -> Tensor:
        """The parameter as matrices of `shape`: a view."""
        parts = parameter.unflatten(0, (self.count, -1)) if self.flat else parameter
        return parts.mT if self.transposed else parts

    def parameter_of(self, matrices: Tensor) -> Tensor:
        """The opposite of `matrices_of`."""
        parts = matrices.mT if self.transposed else matrices
        return parts.flatten(0, 1) if self.flat else parts


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes W x + b of its weight and bias, and nothing else."""
    kind = type(module)
    if kind is nn.Linear or (kind.__module__, kind.__name__) in OWN_WORDS:
        return True
    # torch's attention multiplies by the weight of such a layer without calling it.
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and kind.forward is nn.Linear.forward
    )


def packables(model: PreTrainedModel) -> dict[str, Packable]:
    """What may be packed, by the name of the linear module or embedding, or of the parameter that holds
    experts. What shares its weight with the embedding goes by the embedding's name.

    Not experts that transformers does not call through its interface for experts (`traced_packables`).
    """
    tied = _tied(model)
    found = _embedding(model)
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if is_plain_linear(module) and weight not in tied:
            assert isinstance(module, nn.Linear)
            found[name] = Packable(weight, weight, (module.out_features, module.in_features))
        elif type(module) is Conv1D and weight not in tied:
            found[name] = Packable(weight, weight, (module.nf, module.nx), transposed=True)
        elif is_experts(module):
            experts: Any = module
            for own in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
                key, parameter = f"{name}.{own}", getattr(experts, own, None)
                if isinstance(parameter, nn.Parameter) and parameter.dim() == 3 and key not in tied:
                    shape = parameter.mT.shape if experts.is_transposed else parameter.shape
                    found[key] = Packable(key, f"{key}{PACKED_EXPERTS}", tuple(shape), experts.is_transposed)
    return found


def _embedding(model: PreTrainedModel) -> dict[str, Packable]:
    """The tokens' embedding, if its table may be packed."""
    try:
        table: nn.Module = model.get_input_embeddings()
    except NotImplementedError:  # transformers' answer where a model does not say which it is
        return {}
    name = next((path for path, module in model.named_modules() if module is table), None)
    if name is None or not is_table(table):
        return {}
    assert isinstance(table, nn.Embedding)
    weight = f"{name}.weight"
    pairs = model.all_tied_weights_keys.items()
    sharers = {one for pair in pairs if weight in pair for one in pair} - {weight}
    heads = tuple(sorted(sharer.removesuffix(".weight") for sharer in sharers))
    for head in map(model.get_submodule, heads):
        # transformers pads the bias of such a head to the length of the weight, which is bytes once packed.
        if not is_plain_linear(head) or head.bias is not None:
            return {}
    shape = (table.num_embeddings, table.embedding_dim)
    return {name: Packable(weight, weight, shape, by_row=True, heads=heads)}


def traced_packables(model: PreTrainedModel) -> dict[str, Packable]:
    """Experts outside of transformers' interface that may be packed, by the name of their parameter.

    Which these are is seen by running one block of each kind: what is multiplied by, one by one or all at
    once, and not used otherwise.

    Args:
        model: as `checkpoint.names.skeleton_of` gives it.
    """
    kept = own_parameters(model)
    try:
        anatomy = anatomy_of(model.config) if kept else None
    except UnsupportedArchitectureError:
        anatomy = None
    if anatomy is None:
        return {}
    found = {}
    for index, block in enumerate(anatomy.blocks):
        for matrix in block.experts:
            name = f"{anatomy.path}.{index}.{matrix.weight}"
            if name in kept:
                shape = (kept[name].numel() // prod(matrix.shape), *matrix.shape)
                flat = kept[name].dim() == 2
                found[name] = Packable(name, f"{name}{PACKED_EXPERTS}", shape, matrix.transposed, flat)
    return found


def own_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Where experts outside of transformers' interface may be: parameters of more than one dimension that
    are in modules of a model's own."""
    tied, plain = _tied(model), nn.Linear | nn.Embedding | Conv1D
    return {
        f"{path}.{name}".removeprefix("."): parameter
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")
        and not isinstance(module, plain)
        and not is_experts(module)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and f"{path}.{name}" not in tied
    }


def _tied(model: PreTrainedModel) -> set[str]:
    return {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}


def is_experts(module: nn.Module) -> bool:
    """Whether transformers calls a module through its interface for experts, so that its code can change."""
    return all(hasattr(module, word) for word in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def read_elsewhere(model: PreTrainedModel) -> set[str]:
    """Paths of linear layers and embeddings whose weight is read otherwise than by calling them: for its
    dtype, or for a product in other words. Packed bytes would not do there.

    Found by running the model on tokens without content, as far as it goes: blocks that repeat are alike.

    Args:
        model: on the meta device.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: set[str] = set()

    def spy(module: nn.Module, name: str) -> Any:
        caller = sys._getframe(1).f_locals.get("self")
        if name == "weight" and caller is not module and id(module) in paths:
            found.add(paths[id(module)])
        return nn.Module.__getattr__(module, name)

    tokens = torch.ones(1, 8, dtype=torch.long, device="meta")
    configs = {
        id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)
    }
    set_before = [(config, config._experts_implementation_internal) for config in configs.values()]
    kinds: tuple[Any, ...] = (nn.Linear, nn.Embedding, Conv1D)
    for config in configs.values():
        config._experts_implementation_internal = LEFT_OUT
    for kind in kinds:
        kind.__getattr__ = spy
    try:
        width = getattr(model.config.get_text_config(decoder=True), "hidden_size", 1)
        given = torch.ones(1, 8, width, dtype=model.dtype, device="meta")
        for mask in (None, torch.ones_like(tokens)):  # without one some look for padding in the tokens
            for inputs in ({"input_ids": tokens}, {"inputs_embeds": given}):
                with torch.no_grad(), suppress(Exception), quiet():
                    model(**inputs, attention_mask=mask)
    finally:
        for kind in kinds:
            del kind.__getattr__
        for config, implementation in set_before:
            config._experts_implementation_internal = implementation
    alike = {(type(model.get_submodule(path.rpartition(".")[0])), path.rpartition(".")[2]) for path in found}
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name, _ in module.named_children()
        if (type(module), name) in alike
    }


ALL_EXPERTS_FUNCTIONS.register(LEFT_OUT, lambda module, hidden, index, weights: torch.zeros_like(hidden))
