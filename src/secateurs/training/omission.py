"""A model whose blocks run on a subset of their heads and channels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateurs.training.cutting import Cutting
from secateurs.training.proof import proven_cuts


class Omission(Cutting):
    """Runs the blocks of a model on a subset of their units.

    Args:
        model: a decoder, with or without PEFT's LoRA, sharded by FSDP2 or not.
        in_place: make the parameters small, rather than gather from them in each forward pass.

    Raises:
        UnsupportedArchitectureError: the model's blocks cannot be made out.
        ValueError: nothing can be cut in any of its blocks, or a layer is none that can be sliced (quantised,
            partitioned, or with adapters other than LoRA).
    """

    def __init__(self, model: nn.Module, *, in_place: bool) -> None:
        model = decoder_of(model)
        config: Any = model.config
        self.proven = proven_cuts(config)
        path = self.proven.anatomy.path
        try:
            blocks: Any = model.get_submodule(path)
        except AttributeError:
            kind = type(model).__name__
            raise ValueError(f"{kind} has no '{path}', where models of its type have their blocks") from None
        if len(blocks) != len(self.proven.blocks):
            raise ValueError(
                f"the model has {len(blocks)} blocks in '{path}', its configuration says "
                f"{len(self.proven.blocks)}: set num_hidden_layers to what it has"
            )
        super().__init__(list(blocks.children()), self.proven.blocks, path, in_place=in_place)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model out of what DDP and torch.compile wrap it in."""
    for wrapping in ("module", "_orig_mod"):
        if isinstance(inner := getattr(model, wrapping, None), nn.Module):
            return unwrapped(inner)
    return model


def decoder_of(model: nn.Module) -> nn.Module:
    """The model with the blocks, out of all wrapping, PEFT's included."""
    model = unwrapped(model)
    decoder: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return decoder


def parameter_of(block: nn.Module, name: str) -> nn.Parameter:
    """A parameter of a block, by the name that it has where PEFT has wrapped nothing."""
    path, _, leaf = name.rpartition(".")
    owner: Any = block.get_submodule(path)
    while hasattr(owner, "base_layer"):
        owner = owner.base_layer
    parameter: nn.Parameter = getattr(owner, leaf)
    return parameter


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout or activation checkpointing, and without a draw from the random numbers of training."""
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
        torch.clear_autocast_cache()  # it keeps weights cast without gradients
