"""What `compress` would make of the result: bytes by shapes, zeros and bits, as nothing is there yet."""

from collections.abc import Sequence
from math import prod

import torch
from transformers import PreTrainedModel

from secateurs.anatomy import BlockAnatomy
from secateurs.pruning.allocation.forms import Form
from secateurs.pruning.allocation.room import Parameter, Room
from secateurs.runtime.layout import Codes, Layout, bytes_of_all
from secateurs.runtime.packable import packables
from secateurs.runtime.survey import WORTH
from secateurs.values import Values


def matrices_packed(block: BlockAnatomy, form: Form, dtype: torch.dtype) -> int:
    """Bytes of a block's matrices in a form, at most."""
    return sum(parameter.bytes(form) for parameter in _parameters(block, dtype))


def bytes_of_budget(
    blocks: Sequence[BlockAnatomy],
    dtype: torch.dtype,
    rest: int,
    *,
    budget: int | None,
    bytes_per_weight: float | None,
) -> int:
    """What a budget lets the compressed model take.

    Args:
        blocks: all of them.
        dtype: of the model.
        rest: bytes outside of their matrices.
        budget: bytes of the whole; or
        bytes_per_weight: of the matrices alone.

    Raises:
        ValueError: no choice of zeros and bits is as small, or there is nothing to prune.
    """
    parameters = tuple(parameter for block in blocks for parameter in _parameters(block, dtype))
    if bytes_per_weight is None:
        assert budget is not None
        Room(budget, rest, parameters, (), None).check()
        return budget
    weights = sum(prod(parameter.shape) for parameter in parameters)
    total = int(bytes_per_weight * weights)
    Room(total, 0, parameters, (), weights).check()
    return total + rest


def _parameters(block: BlockAnatomy, dtype: torch.dtype) -> list[Parameter]:
    """A block's matrices, each by itself."""
    return [
        Parameter((matrix.name,), matrix.shape, dtype, matrix.expert is not None)
        for matrix in block.matrices.values()
    ]


def tables_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(tokens, hidden) of the embedding and of the head where it is another matrix, if they can be packed."""
    paths = {id(module): path for path, module in model.named_modules()}
    head = paths.get(id(model.get_output_embeddings()), "")
    return [
        (one.shape[0], one.shape[1]) for name, one in packables(model).items() if one.by_row or name == head
    ]


def table_packed(shape: tuple[int, int], values: Values, dtype: torch.dtype) -> int:
    """Bytes of a table that was rounded."""
    rows, columns = shape
    layout = Layout(rows, columns, rows * columns, dtype)
    codes = Codes(values, False, bytes_of_all(layout, values))
    packed = Layout(rows, columns, rows * columns, dtype, codes).bytes
    return packed if packed <= WORTH * layout.dense_bytes else layout.dense_bytes
