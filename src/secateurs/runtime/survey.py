"""What is worth compressing in a model folder, and what cannot be, found by reading all of it once."""

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.names import abbreviated, own_names
from secateurs.checkpoint.pieces import Piece
from secateurs.runtime.format import Grid, layout_of, layout_of_experts
from secateurs.runtime.layout import DTYPES, MOST_WEIGHTS, ExpertsLayout, Layout, padded
from secateurs.runtime.packable import Packable, is_experts, read_elsewhere
from secateurs.runtime.parameters import Parameters
from secateurs.values import SCALES

WORTH = 0.9  # of the dense bytes: saving less does not pay for expanding the layer at every long prompt

NOTABLE = 0.01
"""Of all bytes: less than that is not worth a word."""


class NothingWorthIt(ValueError):  # noqa: N818 - of a dense model it is only a fact
    """Nothing in a model has zeros enough, or was rounded."""


class Survey(NamedTuple):
    """What is worth compressing, and what is not to be had."""

    layouts: dict[str, Layout | ExpertsLayout]
    """Of what is worth it, by the names of `packables`."""
    renamed: bool
    """Whether one of these is stored under another name than the model's, but for the bare model's prefix."""
    outside: dict[str, int]
    """Matrices of experts that cannot be packed, by the class that keeps them."""
    unpacked: dict[str, float]
    """Shares of the bytes of other parameters that have zeros enough or were rounded, if together they are
    notable."""
    moved: list[str]
    """Parameters that are not on the grid any more that they were rounded to."""


def survey(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, parameters: Parameters, grids: Mapping[str, Grid]
) -> Survey:
    """Read all weights of a dense model.

    Args:
        checkpoint: its files.
        skeleton: the model without weights.
        parameters: of both.
        grids: that parameters, by the model's names, were rounded to.

    Raises:
        NothingWorthIt: says what comes nearest.
        ValueError: there are scales of what the model does not have.
    """
    for stranger in grids.keys() - parameters.pieces.keys():
        raise ValueError(
            f"'{checkpoint.folder / SCALES}' has scales of '{stranger}', which is not in the model: "
            "delete the folder it is in to do without"
        )
    elsewhere = read_elsewhere(skeleton)
    names = {packable.parameter: name for name, packable in parameters.packables.items()}
    prefix = f"{skeleton.base_model_prefix}."
    layouts: dict[str, Layout | ExpertsLayout] = {}
    others: dict[str, Layout | ExpertsLayout] = {}
    moved: list[str] = []
    most, needed, whose, renamed = 0.0, 0.0, "", False
    heads = {f"{head}.weight" for packable in parameters.packables.values() for head in packable.heads}
    for parameter, pieces in parameters.pieces.items():
        if parameter in heads:  # read as the embedding
            continue
        name, shape = names.get(parameter, ""), pieces[0].parameter_shape
        if len(shape) < 2 or {piece.dtype for piece in pieces} not in ({dtype} for dtype in DTYPES.values()):
            continue
        packable = parameters.packables[name] if name else None
        *_, rows, columns = packable.shape if packable else (prod(shape[:-1]), shape[-1])
        if rows * padded(columns) > MOST_WEIGHTS:
            continue
        weights = parameters.read(parameter)
        matrices = packable.matrices_of(weights) if packable else weights.reshape(rows, columns)
        grid = grids.get(parameter) if packable else None
        by_row = packable is not None and packable.by_row
        fitting = grid if grid and _fits(grid, matrices) else None
        layout = _layout(matrices, pieces, fitting, masked=False if by_row else None)
        if grid and layout.codes is None and _whole(grid, matrices):
            moved.append(parameter)
        worth = layout.bytes <= WORTH * layout.dense_bytes
        own, stored = parameter, pieces[0].stored
        known_name = stored in (own, prefix + own, own.removeprefix(prefix))
        if (
            not packable
            or not elsewhere.isdisjoint((name, *packable.heads))
            or not apart(pieces, experts=isinstance(layout, ExpertsLayout))
            or (by_row and not is_one_table(packable, parameters.pieces, parameters.read, skeleton))
        ):
            if worth:
                others[parameter] = layout
            continue
        if by_row and layout.codes is None:
            continue
        if worth:
            layouts[name] = layout
            renamed |= len(pieces) == 1 and not known_name
        if by_row:
            continue
        if not whose or layout.sparsity > most:
            # What the mask and the tail take, and a tenth to be saved.
            overhead = layout.bytes - layout.value_bytes
            most, needed, whose = layout.sparsity, 1 - WORTH + overhead / layout.dense_bytes, name
    unpacked = _notable(others, checkpoint, skeleton, parameters)
    if not layouts:
        found = "it has no linear layers in float32, bfloat16 or float16"
        if whose:
            found = f"'{whose}' has the most zeros, {most:.1%}, where {needed:.0%} are needed: prune it first"
        if unpacked:
            largest = max(unpacked, key=lambda each: unpacked[each])
            kind = type(skeleton.get_submodule(largest.rpartition(".")[0])).__name__
            zeros = f"{others[largest].sparsity:.1%} zeros"
            has = f"has {zeros}" if others[largest].codes is None else "was rounded"
            found = f"'{largest}' {has}, but what {kind} keeps cannot be packed"
        raise NothingWorthIt(f"nothing in '{checkpoint.folder}' is worth compressing: {found}")
    return Survey(layouts, renamed, _outside(skeleton, parameters), unpacked, moved)


def _layout(
    matrices: Tensor, pieces: tuple[Piece, ...], grid: Grid | None, *, masked: bool | None
) -> Layout | ExpertsLayout:
    """Of matrices (out, in) or (experts, out, in), once they are packed."""
    if matrices.dim() == 2:
        return layout_of(matrices, grid, masked=masked)
    stored = {piece.stored: piece.stored_shape for piece in pieces}
    return layout_of_experts(matrices, abbreviated(stored, len(matrices)), grid)


def _whole(grid: Grid, matrices: Tensor) -> bool:
    """Whether all rows were rounded: one that was not has scales of 0 alone."""
    return not bool((matrices.any(dim=-1) & ~grid[1].any(dim=-1)).any()) if _fits(grid, matrices) else True


def _fits(grid: Grid, matrices: Tensor) -> bool:
    """Whether the scales are of such matrices."""
    values, scales = grid
    *outer, columns = matrices.shape
    return tuple(scales.shape) == (*outer, values.groups(columns))


def is_one_table(
    table: Packable,
    pieces: Mapping[str, tuple[Piece, ...]],
    read: Callable[[str], Tensor],
    skeleton: PreTrainedModel,
) -> bool:
    """Whether an embedding and the heads that share its table are the same in the files, and stored as the
    embedding's. (transformers does not tie others.)

    Args:
        table: the embedding.
        pieces: of all parameters.
        read: gives a parameter.
        skeleton: the model without weights.
    """
    heads = [f"{head}.weight" for head in table.heads]
    own = {piece.stored for piece in pieces[table.parameter]}
    others = {piece.stored for head in heads for piece in pieces[head]} - own
    if table.parameter not in own_names(own, skeleton).values():
        return False
    weight = read(table.parameter) if others else None
    return weight is None or all(torch.equal(weight, read(head)) for head in heads)


def apart(pieces: tuple[Piece, ...], *, experts: bool) -> bool:
    """Whether a parameter is stored by itself: a layer's as it is, for packed it keeps its stored name."""
    if experts:
        return all(piece.whole for piece in pieces)
    return len(pieces) == 1 and pieces[0].alone and pieces[0].stored_shape == pieces[0].parameter_shape


def _notable(
    others: dict[str, Layout | ExpertsLayout],
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    parameters: Parameters,
) -> dict[str, float]:
    """Shares of the bytes. Zeros of embeddings do not count: there are some for tokens that there are not."""
    shares: dict[str, float] = {}
    seen = set()
    for name, layout in others.items():
        stored = parameters.pieces[name][0].stored  # tied weights once
        embedding = isinstance(skeleton.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        if (layout.codes is not None or not embedding) and stored not in seen:
            shares[name] = layout.dense_bytes / checkpoint.tensor_bytes
        seen.add(stored)
    return shares if sum(shares.values()) >= NOTABLE else {}


def _outside(skeleton: PreTrainedModel, parameters: Parameters) -> dict[str, int]:
    """Matrices of experts that are not among what may be packed, by the class that keeps them."""
    outside: Counter[str] = Counter()
    for path, module in skeleton.named_modules():
        kind = type(module).__name__
        for name, weight in module.named_parameters(recurse=False):
            known = is_experts(module) or f"{path}.{name}" in parameters.packables
            if "Expert" in kind and weight.dim() > 1 and not known:
                outside[kind] += len(weight) if weight.dim() == 3 else 1
    return dict(outside)
