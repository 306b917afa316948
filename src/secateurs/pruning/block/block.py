"""A block that is being pruned: what the ways of pruning it share."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from secateurs.anatomy import linear_weight
from secateurs.blockwise import BlockwiseModel
from secateurs.pruning.allocation.survey import Patterns
from secateurs.pruning.block.measure import Group
from secateurs.pruning.mlp.linear import Linear, Pruned
from secateurs.pruning.record import BlockReport, LayerReport

Advance = Callable[[str, float | None], None]
"""Told the name of each layer that is done, and its error if it was pruned now."""

Clock = Callable[[str], AbstractContextManager[None]]
"""Counts the time inside towards a phase."""


@dataclass
class Streams:
    """The calibration activations before a block: a (batch, length, hidden) tensor for each batch."""

    pruned: list[Tensor]
    """Of the model as it is pruned so far."""
    dense: list[Tensor] | None
    """Of the dense model, where that is the target."""


@dataclass(frozen=True)
class Block:
    """A materialised block, pruned in place."""

    model: BlockwiseModel
    index: int
    patterns: Patterns
    """Of all layers of the model."""
    weights: dict[str, Tensor]
    """The block's tensors as they will be stored."""

    @property
    def path(self) -> str:
        return f"{self.model.family.blocks}.{self.index}"

    def names(self, *groups: Group) -> list[str]:
        """Of layers, within the model."""
        return [f"{self.path}.{name}" for group in groups for name in group]

    def layer(self, name: str) -> nn.Module:
        return self.model.model.get_submodule(name)

    def linear(self, name: str) -> Linear:
        """A layer as it is stored, in whatever dtype the model runs. `store` may change it."""
        layer = self.layer(name)
        tensors = self.stored(name)
        for leaf, tensor in tensors.items():
            own = layer.get_parameter(leaf)
            # A copy, for the reason given in `BlockwiseModel`: in a file a tensor lies at any address.
            tensors[leaf] = own if own.dtype == tensor.dtype else tensor.to(own.device, copy=True)
        weight = tensors["weight"]
        if linear_weight(layer) is not layer.weight:
            weight = weight.T
        return Linear(weight, tensors.get("bias"), self.patterns[name])

    def stored(self, name: str) -> dict[str, Tensor]:
        """A layer's weight and, if it has one, bias as they stand in the files."""
        parameters = dict(self.layer(name).named_parameters())
        return {leaf: self.weights[self.model.stored_name(f"{name}.{leaf}")] for leaf in parameters}

    def store(self, name: str, sparse: Tensor, bias: Tensor | None) -> None:
        """Put a pruned layer, in the dtype of the files, where the model runs it and where it is saved."""
        layer = self.layer(name)
        weight = linear_weight(layer)
        weight.copy_(sparse)
        self.weights[self.model.stored_name(name + ".weight")] = (
            sparse if weight is layer.weight else sparse.T
        ).cpu()
        if bias is not None:
            layer.get_parameter("bias").copy_(bias)
            self.weights[self.model.stored_name(name + ".bias")] = bias.cpu()


class BlockPruner(Protocol):
    """A way to prune a block."""

    @property
    def follows_dense(self) -> bool:
        """Whether it needs the dense stream."""
        ...

    def copies(self, model: BlockwiseModel) -> float:
        """How many times the pruned stream's activations are kept at once."""
        ...

    def prune(self, block: Block, streams: Streams, clock: Clock, advance: Advance) -> BlockReport:
        """Prune a block in place, and push the dense stream, if there is one, through what it was before.

        The pruned stream stays before the block.
        """
        ...


def layer_report(name: str, pruned: Pruned, seconds: float) -> LayerReport:
    weight = pruned.layer.weight
    return LayerReport(
        name=name,
        pattern=str(pruned.layer.pattern),
        sparsity=int((weight == 0).sum()) / weight.numel(),
        weights=weight.numel(),
        error=pruned.error,
        seconds=round(seconds, 4),
        objective=list(pruned.objective),
    )
