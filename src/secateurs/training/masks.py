"""A pruned model's zeros, held through training: prune, train, evaluate.

A mask says which weights of a parameter may differ from zero. After every optimiser step the others are zero
again, whatever the optimiser. Their gradients are zero, so that they add nothing to momentum, to statistics
over a tensor or to the norm that clipping looks at. Masks may be replaced between steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateurs.anatomy import anatomy_of
from secateurs.anatomy.matrix import Matrix
from secateurs.training.cutting import kept_part, local, make_whole
from secateurs.training.omission import decoder_of, parameter_of, unwrapped
from secateurs.training.zero import fragments_of, stepping, zero_of

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes."""


class Masks:
    """Masks of a model's parameters.

    Example:
        masks = Masks.of_zeros(model)
        masks.attach(optimizer)
        ...  # train
        masks.detach()

    Args:
        model: the model, in whatever wrapping.
        masks: by a parameter's name a tensor of its shape; where it is zero, the parameter is held at zero.

    Raises:
        ValueError: the model has no parameter of that name, or it has another shape.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._model = unwrapped(model)
        self._parameters = dict(self._model.named_parameters())
        self._held: dict[str, Tensor] = {}  # true where zero, of what this process has of the parameter
        self._hooks: list[Any] = []
        self.set(masks)

    @classmethod
    def of_zeros(cls, model: nn.Module) -> "Masks":
        """Hold what is zero now in the matrices of the blocks; of LoRA's layers, in the base.

        Raises:
            UnsupportedArchitectureError: the model's blocks cannot be made out.
        """
        places = places_of(model).items()
        return cls(
            model,
            {
                name: held[0].parameter.detach()
                for name, held in places
                if (local(held[0].parameter) == 0).any()
            },
        )

    @property
    def count(self) -> int:
        """Weights that are held at zero."""
        return sum(int(held.sum()) for held in self._held.values())

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Replace all masks, between optimiser steps. What was held before and is not now may grow again."""
        held: dict[str, Tensor] = {}
        for name, mask in masks.items():
            if name not in self._parameters:
                raise ValueError(f"a mask for '{name}', but the model has no such parameter")
            parameter = self._parameters[name]
            make_whole(parameter)  # of what is omitted at the moment some may be held now
            if mask.shape != parameter.shape:
                shapes = f"{tuple(mask.shape)}, the parameter {tuple(parameter.shape)}"
                raise ValueError(f"the mask of '{name}' has shape {shapes}")
            if isinstance(parameter, DTensor) and not isinstance(mask, DTensor):
                mask = distribute_tensor(mask, parameter.device_mesh, parameter.placements)
            held[name] = (local(mask) == 0).to(parameter.device)
        self._held = held
        self.apply()

    def held(self, name: str) -> Tensor:
        """Where a parameter is held at zero: (its shape), bool; of a sharded one what this process has."""
        return self._held[name]

    def state_dict(self) -> dict[str, Tensor]:
        """All masks, held weights as ones, 8 to a byte."""
        state = {}
        for name, held in self._held.items():
            parameter = self._parameters[name]
            if isinstance(parameter, DTensor):
                held = DTensor.from_local(
                    held.to(torch.uint8),
                    parameter.device_mesh,
                    parameter.placements,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                ).full_tensor()
            state[name] = torch.from_numpy(np.packbits(held.cpu().numpy()))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all masks by those of a `state_dict`.

        Raises:
            ValueError: they are of another model.
        """
        masks = {}
        for name, packed in state.items():
            if name not in self._parameters:
                raise ValueError(f"a mask for '{name}', but the model has no such parameter")
            shape = self._parameters[name].shape
            if len(packed) != -(-shape.numel() // 8):
                raise ValueError(f"the mask of '{name}' is not of a parameter of shape {tuple(shape)}")
            held = np.unpackbits(packed.numpy(), count=shape.numel()).reshape(shape)
            masks[name] = torch.from_numpy(1 - held)
        self.set(masks)

    @torch.no_grad()
    def apply(self) -> None:
        """Set to zero what is held."""
        for name in self._held:
            parameter = self._parameters[name]
            _zero(local(parameter), kept_part(parameter, self._mask(name)))

    def attach(self, optimizer: Optimizer) -> None:
        """Hold the zeros through every step of an optimiser, torch's or accelerate's wrapping of one.

        Of PEFT's LoRA layers the base is frozen; their adapters are masked from here on (see `mask_lora`).

        Raises:
            ValueError: see `mask_lora`; or the optimiser is DeepSpeed's.
        """
        if zero_of(optimizer):
            raise ValueError("ZeRO holds no masks but those of a model's own zeros: KeepZeros() without any")
        self.mask_lora()
        inner = stepping(optimizer)
        self._hooks.append(inner.register_step_post_hook(lambda *_: self.apply()))
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                hook = partial(self._mask_gradient, name)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Let go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def mask_lora(self) -> None:
        """Let PEFT's LoRA layers add nothing to held weights, in forward passes as in the merge.

        For adapters that were trained so; what `attach` does before training. It lasts until they are merged:
        adapters are saved and loaded as plain LoRA, which knows nothing of it.

        Raises:
            ValueError: adapters of another kind than plain LoRA (DoRA, say) are on a held weight.
        """
        layers = [module for module in self._model.modules() if hasattr(module, "lora_A")]
        if layers:
            from secateurs.training.lora import mask_layer

            held = {id(self._parameters[name]) for name in self._held}
            for layer in layers:
                if id(getattr(layer.base_layer, "weight", None)) in held:
                    mask_layer(layer)

    def merge_lora(self, model: Any) -> nn.Module:
        """Merge PEFT's LoRA into the weights it adapts without filling their zeros.

        What adapters that are not masked would add to a held weight is dropped.

        Args:
            model: the `PeftModel` that the masks were made of.

        Returns:
            The plain model, with adapters merged.
        """
        merged: nn.Module = model.merge_and_unload()
        self.apply()
        return merged

    def _mask_gradient(self, name: str, parameter: nn.Parameter) -> None:
        if name in self._held and parameter.grad is not None:
            _zero(local(parameter.grad), kept_part(parameter, self._mask(name)))

    def _mask(self, name: str) -> Tensor:
        """What is held of a parameter, where the parameter is: Trainer moves models to GPUs."""
        self._held[name] = self._held[name].to(self._parameters[name].device)
        return self._held[name]


@dataclass(frozen=True)
class Place:
    """Where a model in training has one of the matrices that pruning prunes."""

    name: str
    """Within the plain model."""
    parameter: nn.Parameter
    """That it lies in; of LoRA's layers the base's."""
    matrix: Matrix


def places_of(model: nn.Module) -> dict[str, list[Place]]:
    """The matrices of a model's blocks, by the names of the parameters in the model as it is wrapped.

    Raises:
        UnsupportedArchitectureError: the model's blocks cannot be made out.
    """
    decoder: Any = decoder_of(model)
    anatomy = anatomy_of(decoder.config)
    found: dict[int, list[Place]] = {}
    blocks = zip(decoder.get_submodule(anatomy.path).children(), anatomy.blocks, strict=True)
    for index, (block, inside) in enumerate(blocks):
        for matrix in inside.matrices.values():
            parameter = parameter_of(block, matrix.weight)
            place = Place(f"{anatomy.path}.{index}.{matrix.name}", parameter, matrix)
            found.setdefault(id(parameter), []).append(place)
    return {name: found[id(p)] for name, p in unwrapped(model).named_parameters() if id(p) in found}


def _zero(tensor: Tensor, held: Tensor) -> None:
    """Set to +0 where `held`, whatever is there: as `masked_fill_`, which takes several times as long on a
    CPU, where it goes weight by weight."""
    tensor.detach().view(BITS[tensor.element_size()]).mul_(~held)


class Held(Protocol):
    """What holds some of a model's weights, or something about them, through training."""

    def attach(self, optimizer: Optimizer) -> None:
        """Hold it through every step of an optimiser."""

    def detach(self) -> None:
        """Let go."""


class MasksOfZero:
    """Holds the zeros in the matrices of a model's blocks where DeepSpeed's ZeRO trains it.

    No process has whole masks: of its own part of the weights it knows which are held, and in a backward pass
    those are held that are zero.

    Args:
        model: the model, in whatever wrapping.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = (held[0].parameter for held in places_of(model).values())
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if any(hasattr(module, "lora_A") for module in model.modules()):
            raise ValueError("zeros under LoRA cannot be held by ZeRO: leave out deepspeed, or the adapters")
        self._held: dict[Tensor, Tensor] = {}
        self._hooks: list[Any] = []

    def attach(self, optimizer: Optimizer) -> None:
        """Hold the zeros of this moment through every step of DeepSpeed's optimiser, in whatever wrapping."""
        for part in fragments_of(zero_of(optimizer), self._parameters):
            if part.flat not in self._held:
                self._held[part.flat] = torch.zeros_like(part.flat, dtype=torch.bool)
            part.of(self._held[part.flat]).copy_(part.of(part.flat) == 0)
        self._hooks.append(stepping(optimizer).register_step_post_hook(lambda *_: self._apply()))
        for parameter in self._parameters:
            self._hooks.append(parameter.register_hook(partial(_without_zeros, parameter)))

    def detach(self) -> None:
        """Let go."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _apply(self) -> None:
        for flat, held in self._held.items():
            _zero(flat, held)


def _without_zeros(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """A gradient that is 0 where its parameter is."""
    return gradient.masked_fill(parameter == 0, 0)


class Keep(TrainerCallback):
    """Keeps what is held through `transformers.Trainer`."""

    def __init__(self, *held: Held) -> None:
        self.held = held

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to what is about to be trained."""
        for held in self.held:
            held.attach(kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go."""
        for held in self.held:
            held.detach()


class KeepZeros(Keep):
    """Keeps a pruned model's zeros through `transformers.Trainer`; composes with sparse training.

    Example:
        Trainer(pruned, args, train_dataset=data, callbacks=[KeepZeros()]).train()

    Args:
        masks: to hold; by default those of the zeros that the model has as training begins.
    """

    def __init__(self, masks: Masks | None = None) -> None:
        super().__init__(*([masks] if masks else []))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to what is about to be trained."""
        if not self.held:
            zero = zero_of(kwargs["optimizer"])
            model = kwargs["model"]
            self.held = (MasksOfZero(model) if zero else Masks.of_zeros(model),)
        super().on_train_begin(args, state, control, **kwargs)
