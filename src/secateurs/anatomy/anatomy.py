"""The anatomy of a model, derived from its configuration: no weight is read, no architecture is known by
name."""

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
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
from secateurs.checkpoint.config import short, without_deepspeed


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its blocks, and what is in each."""

    path: str
    """Of the list of blocks, within the model."""
    blocks: tuple[BlockAnatomy, ...]
    """Blocks of one kind have one and the same anatomy."""
    result: int
    """Which of `blocks.RESULTS` the model makes of a block's result."""

    @property
    def dense(self) -> dict[str, str]:
        """Parameters that hold matrices and are left as they are, blocks in one -> why."""
        return {f"{self.path}.*.{name}": why for block in self.blocks for name, why in block.dense.items()}

    @property
    def alone(self) -> list[str]:
        """Matrices that no MLP is known to be made of, blocks and experts in one."""
        names = [re.sub(r"\.\d+\.", ".*.", name) for block in self.blocks for name in block.alone]
        return [f"{self.path}.*.{name}" for name in dict.fromkeys(names)]


_derived: dict[str, Anatomy] = {}


@torch.inference_mode(False)  # in a caller's, nothing has gradients
def anatomy_of(config: PretrainedConfig) -> Anatomy:
    """Derive a model's anatomy, once for each configuration.

    Raises:
        UnsupportedArchitectureError: its blocks are not to be found, or cannot be run one by one.
    """
    key = fingerprint(config)
    if key not in _derived:
        # Some models' own code draws random numbers.
        with torch.random.fork_rng(devices=[]), without_deepspeed():
            _derived[key] = derive_anatomy(skeleton(config))
    return _derived[key]


def fingerprint(config: PretrainedConfig) -> str:
    """Text that configurations share that describe the same architecture."""

    def told(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        beside = {"use_cache", "dtype", "architectures", "_name_or_path", "transformers_version"}
        return {key: told(inner) for key, inner in value.items() if key not in beside}

    described = told(json.loads(config.to_json_string(use_diff=False)))
    return f"{type(config).__name__} {json.dumps(described, sort_keys=True)}"


@torch.inference_mode(False)
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
                    trace = trace_block(block, call)
                except Exception as error:  # of whatever kind the block's code stumbles into
                    raise UnsupportedArchitectureError(
                        f"unsupported architecture: {model.config.model_type!r} "
                        f"({type(block).__name__} {index} cannot be run by itself: {short(error)})"
                    ) from error
                known[kind] = derive(trace, text, shared)
            found.append(known[kind])
    return Anatomy(path, tuple(found), result)
