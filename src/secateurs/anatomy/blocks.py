"""Where a model's blocks are, which of them are of one kind, and what each is called with."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from secateurs.anatomy.trace import Call, Virtual
from secateurs.checkpoint.config import model_class, short, without_deepspeed


class UnsupportedArchitectureError(ValueError):
    """What the model's blocks do cannot be made out."""


def skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a configuration, its parameters and stored buffers on the meta device.

    Buffers that are computed and not stored (rotary frequencies) are real.
    """
    kind, config = model_class(config)
    with torch.device("meta"), without_deepspeed():
        # A copy: what is built of a configuration writes its dtype there.
        model: PreTrainedModel = kind._from_config(copy.deepcopy(config), dtype=dtype)
    return with_computed_buffers(model).eval().requires_grad_(False)


def with_computed_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """A model on the meta device, its buffers that are computed and not stored as transformers computes
    them."""
    owners: dict[nn.Module, PreTrainedModel] = {}  # of models within models, whose own code computes them
    for owner in model.modules():
        if isinstance(owner, PreTrainedModel):
            owners |= dict.fromkeys(owner.modules(), owner)
    for module in owners:
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set and buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
    for module, owner in reversed(owners.items()):  # some compute those of modules within
        owner._init_weights(module)
    return model


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """What of a model makes hidden states of a text's tokens."""
    decoder: nn.Module = model.get_decoder()
    return decoder if _outermost_lists(decoder) else model.base_model  # some call their head a decoder


def blocks_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """A model's list of blocks, and its path within the model.

    Raises:
        UnsupportedArchitectureError: there is no one such list.
    """
    config: Any = model.config
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = decoder_of(model)
    lists = _outermost_lists(decoder)
    found = [entry for entry in lists if len(entry[1]) == count] or lists
    if len(found) != 1:
        raise UnsupportedArchitectureError(
            f"unsupported architecture: {config.model_type!r} ({type(model).__name__}) has "
            f"{len(found) or 'no'} stacks of blocks, where one is needed"
        )
    [(name, blocks)] = found
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return f"{prefix}.{name}".removeprefix("."), blocks


def _outermost_lists(part: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Lists of modules that hold matrices, and are in no other such list."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in part.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        holds = isinstance(module, nn.ModuleList) and any(p.ndim > 1 for p in module.parameters())
        if holds and not inside:
            found.append((name, module))
    return found


def use_plain_experts(model: nn.Module) -> None:
    """Let a model run its experts one by one, by its own code, so that each of their products is seen."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._experts_implementation_internal = "eager"


Kind = tuple[Any, ...]


def kind_of(block: nn.Module, call: Call) -> Kind:
    """What two blocks have in common that do the same with other weights.

    The settings of all of its modules count, whatever they are called, but for the block's own number.
    """
    parts: list[Any] = []
    for name, module in block.named_modules():
        settings = {
            key: value for key, value in vars(module).items() if _is_plain(value) and key not in NUMBERS
        }
        parts.append((name, type(module), sorted((key, repr(value)) for key, value in settings.items())))
    shapes = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]
    given = [*enumerate(call.args), *sorted(call.kwargs.items())]
    arguments = [(key, value if _is_plain(value) else type(value).__name__) for key, value in given]
    return repr(parts), repr(shapes), repr(arguments)


NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
"""What blocks call their own number."""


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None | tuple) and not isinstance(value, Tensor)


LENGTH = 24
"""Tokens in the text that a block is traced on."""


class _Beside:
    """In the place of what a block gives beside hidden states."""


BESIDE = _Beside()

RESULTS: tuple[Callable[[Tensor], Any], ...] = (
    lambda states: states,
    lambda states: (states,),
    lambda states: (states, BESIDE),
    lambda states: (states, BESIDE, BESIDE),
)
"""What blocks give, in the shapes that models unpack."""


def states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with the hidden states first, however they were given."""
    if args:
        return args, kwargs
    return (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def note_calls(model: PreTrainedModel, blocks: nn.ModuleList) -> tuple[list[Call], int]:
    """What a model calls each of its blocks with, and which of RESULTS it makes of their results.

    Raises:
        UnsupportedArchitectureError: its code does not run, or calls its blocks otherwise than one by one.
    """
    config: Any = model.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    reason = ""
    for number, result in enumerate(RESULTS):
        calls: list[Call] = []

        def note(*args: Any, _result: Any = result, _calls: list[Call] = calls, **kwargs: Any) -> Any:
            args, kwargs = states_of(args, kwargs)
            _calls.append(Call(args, kwargs))
            return _result(args[0])

        for block in blocks:
            block.forward = note
        try:
            with Virtual(torch.Generator().manual_seed(0)):
                decoder_of(model)(input_ids=ids, use_cache=False)
        except Exception as error:  # of whatever kind the model's code stumbles into
            reason = reason or short(error)
        finally:
            for block in blocks:
                del block.forward
        if len(calls) == len(blocks):
            shapes = {getattr(call.args[0], "shape", None) for call in calls}
            handed_on = any(call.hands_on(BESIDE) for call in calls)
            if handed_on:
                reason = "they hand more than hidden states on"
            elif len(shapes) == 1 and None not in shapes:
                return calls, number
    raise UnsupportedArchitectureError(
        f"unsupported architecture: {config.model_type!r} does not call its blocks one after the other"
        + (f" ({reason})" if reason else "")
    )
