"""What the layers of a block see of the calibration text."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateurs.anatomy import linear_weight
from secateurs.blockwise import BlockwiseModel
from secateurs.pruning.solvers.statistics import Statistics

Group = tuple[str, ...]
"""Names within a block of linear layers that share one input."""


class Seen(NamedTuple):
    """What a block was seen to do with a batch."""

    inputs: dict[str, Tensor]
    """What layers were given, (batch, length, in)."""
    outputs: dict[str, Tensor]
    """What layers gave, (batch, length, out)."""
    result: Tensor | None
    """What the block gave, (batch, length, hidden), if it was run to its end."""


class _Enough(Exception):  # noqa: N818 - not an error: the rest of the block is not needed
    pass


def observe(
    model: BlockwiseModel,
    index: int,
    hidden: list[Tensor],
    *,
    inputs: tuple[str, ...] = (),
    outputs: tuple[str, ...] = (),
    whole: bool = False,
) -> Iterator[Seen]:
    """Run a materialised block, as far as it takes, and show what some of its layers are given and give.

    Args:
        model: whose block it is.
        index: of the block.
        hidden: the block's input, a (batch, length, hidden) tensor for each batch.
        inputs: names within the block of the layers whose inputs are wanted.
        outputs: names of those whose outputs are.
        whole: run the block to its end, for its result.
    """
    seen = Seen({}, {}, None)

    def enough() -> None:
        if not whole and len(seen.inputs) == len(inputs) and len(seen.outputs) == len(outputs):
            raise _Enough

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.inputs[name] = given[0]
            enough()

        return note

    def listen_after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(layer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
            seen.outputs[name] = result
            enough()

        return note

    block = model.blocks[index]
    for states in hidden:
        handles = [block.get_submodule(name).register_forward_pre_hook(listen(name)) for name in inputs]
        handles += [block.get_submodule(name).register_forward_hook(listen_after(name)) for name in outputs]
        result = None
        try:
            result = model.run(index, states.to(model.device))
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        yield seen._replace(result=result)
        seen.inputs.clear()
        seen.outputs.clear()


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
    for seen in observe(model, index, hidden, inputs=tuple(group[0] for group in stage)):
        for group, moments in statistics.items():
            moments.update(seen.inputs[group[0]])
    for group, moments in statistics.items():
        if not moments.norms.isfinite().all():
            name = f"{model.family.blocks}.{index}.{group[0]}"
            raise FloatingPointError(f"the inputs of '{name}' hold NaN or Inf on the calibration text")
    return statistics
