"""Loads a model folder, dense or compressed, whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from secateurs.checkpoint import Checkpoint, resolve
from secateurs.checkpoint.config import model_class, quiet, read_config, short
from secateurs.checkpoint.names import skeleton_of
from secateurs.device import resolve_device


def load_model(
    model: str | Path, device: str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model folder's model, in evaluation mode.

    Args:
        model: a folder that holds `config.json` and safetensors, a .gguf file, or a name on the hub.
        device: "cpu", "cuda", "cuda:1"...; by default a GPU where there is one.
        dtype: of its parameters; by default what its config.json names, or else the one that it is stored in.

    Raises:
        ValueError: there is no such model; or its files are broken, quantised, or lack weights that it has.
            Found before weights are read, where that is possible.
    """
    where, folder = resolve_device(device), resolve(model)
    checkpoint = Checkpoint(folder)
    skeleton_of(checkpoint)
    kind, config = model_class(read_config(checkpoint))
    try:
        # By themselves transformers would add adapters that lie in the folder, and not know prefixes.
        with quiet():
            if checkpoint.renamed or (folder / "adapter_config.json").exists():
                loaded = _from_tensors(kind, config, checkpoint, dtype)
            else:
                loaded = kind.from_pretrained(
                    folder, config=config, dtype=dtype or "auto", use_safetensors=True
                )
    except (RuntimeError, OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"'{folder}' does not hold what its config.json describes ({short(error)})"
        ) from None
    return loaded.eval().to(where)


def _from_tensors(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """The model from what the checkpoint gives, under the names by which it gives it."""
    model: Any = kind.from_pretrained(
        None, config=config, dtype=dtype or "auto", state_dict=checkpoint.load(checkpoint.file_of)
    )
    model.config.name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model
