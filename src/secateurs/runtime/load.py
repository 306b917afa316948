"""Loads a model folder, dense or compressed, whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateurs.checkpoint import Checkpoint
from secateurs.device import resolve_device


def load_model(folder: Path, device: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model folder's model, in evaluation mode.

    Args:
        folder: holds `config.json` and safetensors.
        device: "cpu", "cuda", "cuda:1"...; by default a GPU where there is one.
        dtype: of its parameters; by default the one that it is stored in.

    Raises:
        ValueError: the files are broken, or lack weights that the model has.
    """
    where = resolve_device(device)
    Checkpoint(folder)
    auto: Any = AutoModelForCausalLM  # its types forget that it returns a pair here
    try:
        model, report = auto.from_pretrained(
            folder,
            dtype=dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (RuntimeError, OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"'{folder}' does not hold what its config.json describes ({reason})") from None
    # transformers gives such weights random values and goes on.
    if report["missing_keys"]:
        raise ValueError(f"'{folder}' holds no tensor '{min(report['missing_keys'])}'")
    return model.eval().to(where)
