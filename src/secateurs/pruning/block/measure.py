"""What the matrices of a block see of the calibration text."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from secateurs import ranks
from secateurs.anatomy import Matrix
from secateurs.anatomy.products import Watch
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.pruning.solvers.statistics import Statistics

Group = tuple[Matrix, ...]
"""Matrices of a block that share one input."""


class Seen(NamedTuple):
    """What a block was seen to do with a batch."""

    inputs: dict[str, Tensor]
    """What matrices were given, (..., in), by their names. An expert that no token goes to is given
    nothing."""
    outputs: dict[str, Tensor]
    """What matrices gave, (..., out)."""
    result: Tensor | None
    """What the block gave, (batch, length, hidden), if it was run to its end."""


class _Enough(Exception):  # noqa: N818 - not an error: the rest of the block is not needed
    pass


def observe(
    model: BlockwiseModel,
    index: int,
    hidden: list[Batch],
    *,
    inputs: Collection[Matrix] = (),
    outputs: Collection[Matrix] = (),
    whole: bool = False,
    keep: bool = False,
) -> Iterator[Seen]:
    """Run a materialised block, as far as it takes, and show what some of its matrices are given and give.

    Args:
        model: whose block it is.
        index: of the block.
        hidden: the block's input.
        inputs: the matrices whose inputs are wanted.
        outputs: those whose outputs are.
        whole: run the block to its end, for its result.
        keep: what it leaves for later blocks.
    """
    of_inputs = {(matrix.weight, matrix.expert): matrix.name for matrix in inputs}
    of_outputs = {(matrix.weight, matrix.expert): matrix.name for matrix in outputs}
    # Whether an expert is still to come is not known before the end.
    to_end = whole or any(matrix.expert is not None for matrix in (*inputs, *outputs))
    seen = Seen({}, {}, None)

    def enough() -> None:
        if not to_end and len(seen.inputs) == len(of_inputs) and len(seen.outputs) == len(of_outputs):
            raise _Enough

    def before(weight: str, expert: int | None, given: Tensor) -> None:
        if (weight, expert) in of_inputs:
            seen.inputs[of_inputs[weight, expert]] = given
            enough()

    def after(weight: str, expert: int | None, product: Tensor) -> None:
        if (weight, expert) in of_outputs:
            seen.outputs[of_outputs[weight, expert]] = product
            enough()

    watch = Watch(dict(model.blocks[index].named_parameters()), before, after)
    for batch in hidden:
        result = None
        try:
            with watch:
                result = model.run(index, batch, keep=keep)
        except _Enough:
            pass
        yield seen._replace(result=result)
        seen.inputs.clear()
        seen.outputs.clear()


def measure(
    model: BlockwiseModel, index: int, stage: tuple[Group, ...], hidden: list[Batch]
) -> dict[Group, Statistics]:
    """Second moments of what groups of matrices in a materialised block see.

    Args:
        model: whose block it is.
        index: of the block.
        stage: the groups, in the order of the forward pass. Experts count by the tokens that are routed to
            them, and where there are none all inputs count alike.
        hidden: the block's input; without any, every input counts alike (H is the identity over its width).

    Raises:
        FloatingPointError: the inputs hold NaN or Inf; names the matrix.
    """
    if not hidden:
        return {group: alike(group[0].shape[1], model.device) for group in stage}
    statistics = {group: Statistics(group[0].shape[1], device=model.device) for group in stage}
    if not stage:
        return statistics
    for seen in observe(model, index, hidden, inputs=[group[0] for group in stage]):
        for group, moments in statistics.items():
            if group[0].name in seen.inputs:
                moments.update(seen.inputs[group[0].name])
    ranks.pool(*statistics.values())
    for group, moments in statistics.items():
        if not moments.tokens:
            statistics[group] = alike(group[0].shape[1], model.device)
        check_finite(moments, f"{model.path}.{index}.{group[0].name}")
    return statistics


def alike(width: int, device: torch.device) -> Statistics:
    """Of inputs that all count alike."""
    return Statistics.from_inputs(torch.eye(width, device=device))


def check_finite(moments: Statistics, name: str) -> None:
    """Raises FloatingPointError, which names the matrix, if its inputs are not."""
    if not moments.norms.isfinite().all():
        raise FloatingPointError(f"the inputs of '{name}' hold NaN or Inf on the calibration text")
