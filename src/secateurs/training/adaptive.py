"""Pruning that adapts during training: from the model as it is to a pattern, while it learns the task.

Sparsity rises by the cubic schedule of Zhu and Gupta (arXiv 1710.01878). At every update the smallest weights
of each matrix fall, and training makes up for them before the next. How many fall in which matrix the task
tells, by w^2 E[g^2]: the loss that the removal of a weight is expected to cost by the diagonal of the
empirical Fisher matrix (as in optimal brain damage), which compares across layers. Adam's second moments hold
E[g^2] already, so it takes no memory. Within a matrix magnitude turned out the better guide.
"""

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PretrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from secateurs.anatomy import anatomy_of
from secateurs.budget import most_zeros
from secateurs.pattern import Pattern, Unstructured, parse_pattern
from secateurs.training.cutting import local, make_whole, whole_gradient, whole_of
from secateurs.training.falling import choose, share_out
from secateurs.training.masks import Masks, Place, places_of
from secateurs.training.omission import decoder_of
from secateurs.training.zero import zero_of

Rise = Literal["cubic", "linear"]

MASKS = "masks.safetensors"
"""In a checkpoint, the masks of the moment."""

ROUNDING = 1e-3
"""By how much a share of zeros may be above that of a pattern."""

BEST = "load_best_model_at_end may bring back weights from before the end of pruning: leave it off"

ZERO = "pruning on the way looks at whole matrices and moments, ZeRO has parts: leave out deepspeed"


class AdaptivePruning(TrainerCallback):
    """Prunes a model while it is trained: a callback for Trainer and TRL, or three calls in your own loop.

    Example:
        Trainer(model, args, train_dataset=data, callbacks=[AdaptivePruning("70%")]).train()

    Example:
        pruning = AdaptivePruning("2:4")
        pruning.attach(model, optimizer, total_steps=1000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            pruning.step()
            optimizer.zero_grad()
        pruning.detach()

    It composes with `SparsityAcceleratedTraining`. With PEFT's LoRA the base is pruned by what base and
    adapters make together; merge them by `masks.merge_lora`.

    Args:
        pattern: to end with: "70%", "2:4", or a pattern. Zeros that the model has stay and count.
        start: steps until pruning starts, or below 1 their share of all steps; best after the warm-up.
        end: likewise until the pattern is reached. From there on the zeros stay.
        schedule: how sparsity rises: "cubic", fast at first and ever slower, or "linear".
        every: steps from one update to the next, likewise.
        grow: share of the weights left that each update drops beyond that, in exchange for as many zeros
            where the gradient is largest (RigL, arXiv 1911.11134), which start again from 0.
        across_layers: share the zeros out by what their fall costs, where Adam's second moments of all
            weights tell, and the pattern is unstructured; a tenth of what it leaves stays in each matrix.
            Otherwise each has as many.

    Raises:
        ValueError: a setting is unknown or out of its range.
    """

    masks: Masks
    """What is held at zero, once attached."""

    def __init__(
        self,
        pattern: str | Pattern,
        *,
        start: float = 0.05,
        end: float = 0.6,
        schedule: Rise = "cubic",
        every: float = 0.01,
        grow: float = 0.0,
        across_layers: bool = True,
    ) -> None:
        self.pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern
        if schedule not in get_args(Rise):
            raise ValueError(f"unknown schedule '{schedule}': choose from {', '.join(get_args(Rise))}")
        if start < 0 or end <= 0 or ((start < 1) == (end < 1) and start >= end):
            raise ValueError(f"pruning must end after it starts, not start at {start:g} and end at {end:g}")
        if every <= 0:
            raise ValueError(f"every is a number of steps, or a share of them, above 0, not {every:g}")
        if not 0 <= grow < 1:
            raise ValueError(f"grow is a share of the weights that are left, in [0, 1), not {grow:g}")
        self._start, self._end, self._every = start, end, every
        self.schedule, self.grow, self.across_layers = schedule, grow, across_layers
        self.attached = self._warned = False

    def span(self, total_steps: int) -> tuple[int, int, int]:
        """The steps at which pruning starts and ends, and those between two updates.

        Raises:
            ValueError: that does not fit into training.
        """
        asked = (self._start, self._end, self._every)
        start, end, every = (int(value) if value >= 1 else round(value * total_steps) for value in asked)
        if end > total_steps:
            raise ValueError(f"pruning ends at step {end}, training makes {total_steps}")
        if start >= end:
            raise ValueError(f"pruning must end after it starts, not start at step {start} and end at {end}")
        return start, end, max(1, every)

    def check_shapes(self, config: PretrainedConfig) -> None:
        """See, before it is loaded, whether the matrices of a model suit the pattern.

        Raises:
            UnsupportedArchitectureError: the model's blocks cannot be made out.
            ValueError: inputs do not divide into groups of m.
        """
        anatomy = anatomy_of(config)
        for index, block in enumerate(anatomy.blocks):
            for matrix in block.matrices.values():
                self.pattern.check_width(f"{anatomy.path}.{index}.{matrix.name}", matrix.shape[1])

    def check(self, model: nn.Module) -> None:
        """See whether a model can come to the pattern.

        Raises:
            UnsupportedArchitectureError: the model's blocks cannot be made out.
            ValueError: see `check_shapes`; or the model is sparser already.
        """
        config: Any = decoder_of(model).config
        self.check_shapes(config)
        # Where a run goes on, what has just come back is zero still.
        most = 1 - (1 - self.pattern.sparsity) * (1 - self.grow) + ROUNDING
        if (sparsity := _sparsity(places_of(model))) > most:
            raise ValueError(f"the model has {sparsity:.1%} zeros already, more than {self.pattern} asks for")

    def attach(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        """Begin; zeros that the model has are held from here on.

        Args:
            model: what training calls, or the model inside its wrapping (DDP, torch.compile, FSDP2, PEFT).
            optimizer: a torch optimiser, or accelerate's wrapping of one.
            total_steps: optimiser steps that training will make.

        Raises:
            UnsupportedArchitectureError: the model's blocks cannot be made out.
            ValueError: see `span` and `check`; or there are adapters of another kind than plain LoRA, or LoRA
                and `grow`.
        """
        if zero_of(optimizer):
            raise ValueError(ZERO)
        if self.attached:  # training that was cut short begins again
            self.detach()
        self.start, self.end, self.every = self.span(total_steps)
        self.check(model)
        self._places = places_of(model)
        layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
        self._lora = {id(getattr(layer.base_layer, "weight", None)): layer for layer in layers}
        if self.grow and self._lora:
            raise ValueError(
                "grow needs the gradients of all weights, LoRA has those of its adapters: leave it off"
            )
        self._optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.step_number = 0
        """Optimiser steps made."""
        self.sparsity = self._first = _sparsity(self._places)
        """The share of all matrices together that is held at zero."""
        self._gradients: dict[str, Tensor] = {}
        # Before the hooks of the masks, which zero what these are to see.
        self._hooks: list[Any] = [
            held[0].parameter.register_post_accumulate_grad_hook(partial(self._see, name))
            for name, held in self._places.items()
            if self.grow and held[0].parameter.requires_grad
        ]
        self.masks = Masks(model, {name: held[0].parameter.detach() for name, held in self._places.items()})
        self.masks.attach(self._optimizer)
        self.attached = True

    def step(self) -> None:
        """Tell that the optimiser has made a step."""
        self.step_number += 1
        if self.is_due(self.step_number):
            self._update()

    def detach(self) -> None:
        """Let go."""
        self.attached = False
        self.masks.detach()
        for hook in self._hooks:
            hook.remove()
        self._gradients.clear()

    def is_due(self, step: int) -> bool:
        """Whether the masks change once so many steps are made."""
        return self.start < step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)

    def aim(self, step: int) -> float:
        """The share of zeros that is due once so many steps are made."""
        left = 1 - min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        left **= 3 if self.schedule == "cubic" else 1
        return self.pattern.sparsity + (self._first - self.pattern.sparsity) * left

    @property
    def record(self) -> dict[str, Any]:
        """What was asked for, in steps; once attached."""
        names = ("start", "end", "every", "schedule", "grow", "across_layers")
        return {"pattern": str(self.pattern), **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def _update(self) -> None:
        """Replace the masks by those that are due."""
        # Sparse training keeps state small, and makes it whole for whoever asks for all of it.
        self._optimizer.state_dict()
        zeros = self._share_out(self.aim(self.step_number))
        masks: dict[str, Tensor] = {}
        kept = 0
        for name, held in self._places.items():
            parameter = held[0].parameter
            gradient = self._summed(self._gradients.pop(name)) if name in self._gradients else None
            mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            for place in held:
                seen = None if gradient is None else place.matrix.of(gradient).float().abs()
                keep = choose(self._magnitude(place), self.pattern, zeros[place.name], seen, self.grow)
                place.matrix.of(mask).copy_(keep)
                kept += int(keep.sum())
            masks[name] = mask
        before = {name: self.masks.held(name) for name in masks}
        self.masks.set(masks)
        for name, was in before.items():
            self._settle(self._places[name][0].parameter, was, self.masks.held(name))
        self.sparsity = 1 - kept / sum(map(_size, _all(self._places)))

    def _settle(self, parameter: nn.Parameter, before: Tensor, held: Tensor) -> None:
        """Make the optimiser forget what fell, and take what comes back for an average weight."""
        for key, value in self._optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                local(value).masked_fill_(held, 0)
                if self.grow and key == "exp_avg_sq":
                    moments = whole_of(value)  # from 0 Adam's first steps would be three times too long
                    mean = moments.sum() / (moments > 0).sum().clamp_min(1)
                    local(value)[before & ~held] = mean.to(value.dtype)

    def _share_out(self, share: float) -> dict[str, int]:
        """How many zeros each matrix is to have."""
        places = list(_all(self._places))
        now, sizes = [_zeros(place) for place in places], [_size(place) for place in places]
        if self.across_layers and isinstance(self.pattern, Unstructured):
            moments = [self._optimizer.state.get(place.parameter, {}).get("exp_avg_sq") for place in places]
            if all(each is not None for each in moments):
                costs = map(_cost, places, moments)
                counts = share_out(costs, now, sizes, share, most_zeros(self.pattern.sparsity))
                return {place.name: count for place, count in zip(places, counts, strict=True)}
            if not (self._lora or self._warned):
                self._warned = True
                kind = type(self._optimizer).__name__
                warnings.warn(
                    f"{kind} has no second moments of all weights, as Adam has: matrices share alike",
                    stacklevel=4,
                )
        alike = [max(round(share * size), zeros) for size, zeros in zip(sizes, now, strict=True)]
        return {place.name: count for place, count in zip(places, alike, strict=True)}

    def _magnitude(self, place: Place) -> Tensor:
        """(out, in), float32: of what base and adapters make together."""
        weight = _weight(place).float()
        layer = self._lora.get(id(place.parameter))
        if layer is not None:
            for adapter in layer.active_adapters:
                weight = weight + place.matrix.of(layer.get_delta_weight(adapter)).float() * (weight != 0)
        return weight.abs()

    def _summed(self, gradient: Tensor) -> Tensor:
        """The gradient of all ranks together."""
        if isinstance(gradient, DTensor):
            return gradient.full_tensor()
        if dist.is_initialized():
            dist.all_reduce(gradient)
        return gradient

    def _see(self, name: str, parameter: nn.Parameter) -> None:
        """Keep the gradients of zeros, if the masks are to change after this step."""
        if self.is_due(self.step_number + 1) and parameter.grad is not None:
            gradient = whole_gradient(parameter)
            seen = self._gradients.get(name)
            self._gradients[name] = gradient if seen is None else seen.add_(gradient)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs beside weights and optimiser: where it is, and the masks."""
        numbers = torch.tensor([self.step_number, self._first, self.sparsity], dtype=torch.float64)
        return {"progress": numbers, **self.masks.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was called; after `attach`, with the same model and settings.

        Raises:
            ValueError: the state is of another model.
        """
        step, self._first, self.sparsity = state["progress"].tolist()
        self.step_number = int(step)
        self.masks.load_state_dict({name: mask for name, mask in state.items() if name != "progress"})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to what is about to be trained, or go on where the checkpoint was written."""
        if args.load_best_model_at_end:
            raise ValueError(BEST)
        self.attach(kwargs["model"], kwargs["optimizer"], state.max_steps)
        self.step_number = state.global_step
        if state.global_step:
            folder = Path(args.resume_from_checkpoint or _checkpoint(args, state))
            if not folder.is_dir():
                raise ValueError(
                    f"the checkpoint that training goes on from is not '{folder}': name it in the arguments "
                    "(resume_from_checkpoint) too, for the masks that it holds"
                )
            if (folder / MASKS).is_file():  # otherwise plain training so far
                self.load_state_dict(load_file(folder / MASKS))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell that an optimiser step is done."""
        self.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the share of zeros beside the loss."""
        if logs and "loss" in logs:
            for entry in (logs, state.log_history[-1]):  # callbacks after this one are given `logs`
                entry["sparsity"] = self.sparsity

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the masks to the checkpoint."""
        masks = self.state_dict()
        if args.should_save:
            save_file(masks, _checkpoint(args, state) / MASKS)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go."""
        self.detach()


def shares_of(model: nn.Module) -> dict[str, float]:
    """The share of zeros in each matrix of a model, by its name in the plain model."""
    return {place.name: _zeros(place) / _size(place) for place in _all(places_of(model))}


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _all(places: dict[str, list[Place]]) -> Iterator[Place]:
    return chain.from_iterable(places.values())


def _size(place: Place) -> int:
    rows, columns = place.matrix.shape
    return rows * columns


def _weight(place: Place) -> Tensor:
    """(out, in), all of it, whatever sparse training or ranks have made of the parameter."""
    make_whole(place.parameter)
    return place.matrix.of(whole_of(place.parameter))


def _cost(place: Place, moments: Tensor) -> Tensor:
    """(out, in), float32: what the loss is expected to rise by where a weight falls."""
    seen = place.matrix.of(whole_of(moments)).float()
    # What sparse steps have left out so far may be worth as much as what they have not.
    typical = seen.sum() / (seen > 0).sum().clamp_min(1)
    return _weight(place).float().square() * seen.where(seen > 0, typical)


def _zeros(place: Place) -> int:
    return int((_weight(place) == 0).sum())


def _sparsity(places: dict[str, list[Place]]) -> float:
    return sum(map(_zeros, _all(places))) / sum(map(_size, _all(places)))
