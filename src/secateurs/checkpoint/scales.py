"""The scales beside a rounded model's weights: see `secateurs.values.SCALES`."""

import json
from collections.abc import Mapping
from pathlib import Path

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
