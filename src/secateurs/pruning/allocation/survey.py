"""One look at the dense model, block by block, before anything is pruned: what an allocation may go by.

Memory is that of pruning itself: one block, its second moments and the calibration activations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.device import home_of
from secateurs.pattern import Pattern
from secateurs.pruning.block.measure import measure
from secateurs.pruning.solvers.statistics import Statistics

Patterns = dict[str, Pattern | None]
"""For each layer by name, in the order of the walk; None keeps it dense."""


class Layer(NamedTuple):
    """A linear layer of a materialised block."""

    name: str
    """Within the whole model."""
    weight: Tensor
    """(out, in), in the model's dtype: the layer's own."""
    statistics: Statistics


@dataclass(frozen=True)
class SurveyedBlock:
    """A materialised block of the dense model."""

    index: int
    layers: list[Layer]
    """Its linear layers, in the order of the forward pass."""
    hidden: list[Batch]
    """Its input; empty without text."""


@dataclass(frozen=True)
class Survey:
    """A dense model and its calibration text.

    Args:
        model: the model.
        tokens: (samples, length) ids, or None: then every input counts alike.
        batch_size: sequences run at once.
        advance: told of each layer that has been looked at.
    """

    model: BlockwiseModel
    tokens: Tensor | None
    batch_size: int
    advance: Callable[[str], None]

    @torch.no_grad()
    def blocks(self) -> Iterator[SurveyedBlock]:
        """Each block, materialised until the next is asked for. It must be left as it was."""
        model = self.model
        hidden: list[Batch] = []
        if self.tokens is not None:
            hidden = model.embed(self.tokens, batch_size=self.batch_size)
            home = home_of([batch.states for batch in hidden], model.device)
            for batch in hidden:
                batch.states = batch.states.to(home)
        for index, block in enumerate(model.blocks):
            anatomy = model.anatomy.blocks[index]
            with model.block(index):
                statistics = measure(model, index, anatomy.groups, hidden)
                layers = [
                    Layer(
                        f"{model.path}.{index}.{matrix.name}",
                        matrix.of(block.get_parameter(matrix.weight)),
                        statistics[group],
                    )
                    for group in anatomy.groups
                    for matrix in group
                ]
                yield SurveyedBlock(index, layers, hidden)
                for layer in layers:
                    self.advance(layer.name)
                if index + 1 < len(model.blocks):
                    for batch in hidden:
                        model.push(index, batch)


class Allocator(Protocol):
    """Shares a budget out by what a survey shows: a frozen dataclass of settings with one method."""

    def allocate(self, survey: Survey, budget: Pattern) -> Patterns:
        """Give each layer its pattern; together they ask for what the budget asks for, to the weight.

        Args:
            survey: of the model.
            budget: the pattern that all layers would have alike.

        Raises:
            FloatingPointError: the inputs of a layer hold NaN or Inf; names it.
        """
        ...


def layer_shapes(model: BlockwiseModel) -> dict[str, tuple[int, int]]:
    """Every matrix's name and (out, in), in the order of the walk."""
    return {
        f"{model.path}.{index}.{matrix.name}": matrix.shape
        for index, anatomy in enumerate(model.anatomy.blocks)
        for matrix in anatomy.matrices.values()
    }
