"""The scales of a rounded model, in a file of their own beside its weights (see `secateurs.values`)."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateurs.checkpoint.writing import write_tensors
from secateurs.finite import all_finite
from secateurs.values import SCALES, Values


def write_scales(folder: Path, scales: Mapping[str, tuple[Values, Tensor]]) -> None:
    """Write `quantised/scales.safetensors` into a model folder, whole or not at all.

    Args:
        folder: of the model.
        scales: by the parameter's name: its grid, and its scales (rows, groups) or (experts, rows, groups),
            bfloat16.
    """
    path = folder / SCALES
    path.parent.mkdir(exist_ok=True)
    tensors = {name: each.to(torch.bfloat16) for name, (_, each) in scales.items()}
    write_tensors(path, tensors, {n: json.dumps(values.describe()) for n, (values, _) in scales.items()})


def read_scales(folder: Path) -> dict[str, tuple[Values, Tensor]]:
    """What `write_scales` wrote; empty where there is no such file.

    Raises:
        ValueError: the file is broken, or says something else of a parameter than a grid and finite scales.
    """
    path = folder / SCALES
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' is truncated or not a safetensors file ({error})") from None
    found = {}
    for name, scales in tensors.items():
        try:
            values = Values(**json.loads(described[name]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' does not say what grid '{name}' is on ({error})") from None
        if scales.dtype != torch.bfloat16 or scales.dim() not in (2, 3) or not all_finite(scales):
            raise ValueError(
                f"'{path}' should hold finite bfloat16 scales of '{name}', (rows, groups) or "
                f"(experts, rows, groups), but has {scales.dtype} {tuple(scales.shape)}"
            )
        found[name] = (values, scales)
    return found
