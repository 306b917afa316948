"""The anatomy of a model, derived from its configuration: no weight is read, no architecture is known by
name."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from secateurs.anatomy.blocks import (
    UnsupportedArchitectureError,
    blocks_of,
    kind_of,
    note_calls,
    skeleton,
)
from secateurs.anatomy.derive import BlockAnatomy, derive
from secateurs.anatomy.trace import implemented_here, trace_block
from secateurs.checkpoint.config import short


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its blocks, and what is in each."""

    path: str
    """Of the list of blocks, within the model."""
    blocks: tuple[BlockAnatomy, ...]
    """Blocks of one kind have one and the same anatomy."""
    result: int
    """Which of `blocks.RESULTS` the model makes of a block's result."""


def anatomy_of(config: PretrainedConfig) -> Anatomy:
    """Derive a model's anatomy.

    Raises:
        UnsupportedArchitectureError: its blocks are not to be found, or cannot be run one by one.
    """
    return derive_anatomy(skeleton(config))


def derive_anatomy(model: PreTrainedModel) -> Anatomy:
    """The same of a model on the meta device (`skeleton`)."""
    path, blocks = blocks_of(model)
    text = model.config.get_text_config(decoder=True)
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    known: dict[Any, BlockAnatomy] = {}
    found = []
    with implemented_here(model):
        calls, result = note_calls(model, blocks)
        for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            inside = f"{path}.{index}."
            shared = sorted(name.removeprefix(inside) for name in tied if name.startswith(inside))
            kind = (*kind_of(block, call), *shared)
            if kind not in known:
                try:
                    known[kind] = derive(trace_block(block, call), text, shared)
                except Exception as error:  # of whatever kind the block's code stumbles into
                    raise UnsupportedArchitectureError(
                        f"unsupported architecture: {model.config.model_type!r} "
                        f"({type(block).__name__} {index} cannot be run by itself: {short(error)})"
                    ) from error
            found.append(known[kind])
    return Anatomy(path, tuple(found), result)
