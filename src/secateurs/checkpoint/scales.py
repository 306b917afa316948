"""The scales beside a rounded model's weights: see `secateurs.values.SCALES`."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateurs.checkpoint.writing import write_tensors
from secateurs.values import SCALES, Values


def write_scales(folder: Path, parameters: Mapping[str, tuple[Values, Tensor]]) -> None:
    """Write them into a model's folder.

    Args:
        folder: the model's.
        parameters: by their names in the model: the grid, and scales (rows, groups) or (experts, rows,
            groups), bfloat16.
    """
    path = folder / SCALES
    path.parent.mkdir(exist_ok=True)
    grids = {name: json.dumps(values.describe()) for name, (values, _) in parameters.items()}
    write_tensors(path, {name: scales for name, (_, scales) in parameters.items()}, grids)


def read_scales(folder: Path) -> dict[str, tuple[Values, Tensor]]:
    """What `write_scales` wrote; empty where a folder has none.

    Raises:
        ValueError: the file is broken, or is not what it was written as.
    """
    path = folder / SCALES
    if not path.is_file():
        return {}
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            grids = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                found[name] = Values(**json.loads(grids[name])), file.get_tensor(name)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is broken ({error}): delete the folder it is in to do without") from None
    for name, (_, scales) in found.items():
        if scales.dtype != torch.bfloat16 or not scales.isfinite().all():
            raise ValueError(f"'{path}' is broken: the scales of '{name}' are not finite bfloat16")
    return found
