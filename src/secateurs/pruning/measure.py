"""What the layers of a block see of the calibration text."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from secateurs.anatomy import linear_weight
from secateurs.blockwise import BlockwiseModel
from secateurs.pruning.statistics import Statistics

Group = tuple[str, ...]
"""Names within a block of linear layers that share one input."""


class _Enough(Exception):  # noqa: N818 - not an error: the rest of the block is not needed
    pass


def inputs_of(
    model: BlockwiseModel, index: int, layers: tuple[str, ...], hidden: list[Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Run a materialised block as far as the last of some layers, and show what they are given.

    Args:
        model: whose block it is.
        index: of the block.
        layers: names within the block, in the order of the forward pass.
        hidden: the block's input, a (batch, length, hidden) tensor for each batch.

    Yields:
        For each batch, the input (batch, length, in) of each layer.
    """
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]
            if name == layers[-1]:
                raise _Enough

        return note

    block = model.blocks[index]
    for states in hidden:
        handles = [block.get_submodule(name).register_forward_pre_hook(listen(name)) for name in layers]
        try:
            model.run(index, states.to(model.device))
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        yield seen
        seen.clear()


def measure(
    model: BlockwiseModel, index: int, stage: tuple[Group, ...], hidden: list[Tensor]
) -> dict[Group, Statistics]:
    """Second moments of what groups of layers in a materialised block see.

    Args:
        model: whose block it is.
        index: of the block.
        stage: the groups, in the order of the forward pass.
        hidden: the block's input, a (batch, length, hidden) tensor for each batch; without any, every input
            counts alike (H is the identity over its width).

    Raises:
        FloatingPointError: the inputs hold NaN or Inf; names the layer.
    """
    width = {group: linear_weight(model.blocks[index].get_submodule(group[0])).shape[1] for group in stage}
    if not hidden:
        return {
            group: Statistics.from_inputs(torch.eye(width[group], device=model.device)) for group in stage
        }
    statistics = {group: Statistics(width[group], device=model.device) for group in stage}
    for inputs in inputs_of(model, index, tuple(group[0] for group in stage), hidden):
        for group, moments in statistics.items():
            moments.update(inputs[group[0]])
    for group, moments in statistics.items():
        if not moments.norms.isfinite().all():
            name = f"{model.family.blocks}.{index}.{group[0]}"
            raise FloatingPointError(f"the inputs of '{name}' hold NaN or Inf on the calibration text")
    return statistics
