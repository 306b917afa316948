"""How far a block's result moves when one of its matrices changes, token by token.

In general the block is run again. But an expert touches its own tokens alone, and there may be hundreds of
experts. Where the block's result y is linear in what an expert's last matrix gives, d (tokens, hidden), only
that expert is run:

    y' - y = S (d' - d)

Nothing is known of S (the router's weight, where each token is put, what comes after) but what autograd says:
the gradient of y, S^T v, is linear in v, and its own gradient gives S of anything.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from secateurs.anatomy.dependence import leaves_of
from secateurs.anatomy.products import Watch
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.pruning.block.block import Block
from secateurs.pruning.block.experts import Expert, channels, experts_of


@dataclass(frozen=True)
class _Way:
    """How the result of a batch follows from what an expert gives."""

    tokens: Tensor
    """(tokens, in), the expert's."""
    gives: Tensor
    """d: what it gives for them as long as it is dense."""
    back: Tensor
    """S^T v, of the shape of d."""
    v: Tensor
    """Of the shape of the result."""

    def moved(self, gives: Tensor) -> Tensor:
        """y' - y where the expert gives something else."""
        change = (gives - self.gives.view_as(gives)).view_as(self.back)
        [moved] = torch.autograd.grad(self.back, self.v, change, retain_graph=True)
        return moved


class Change:
    """The change of a materialised block's result. Made while the block is dense.

    Args:
        model: whose block it is.
        index: of the block.
        batches: the block's input.
    """

    def __init__(self, model: BlockwiseModel, index: int, batches: list[Batch]) -> None:
        self._block, self._batches = Block(model, index, {}, {}), batches
        self._dense = [model.run(index, batch).float() for batch in batches]
        experts = [expert for module in experts_of(self._block) for expert in module.members]
        self._ways = [_ways(self._block, experts, batch) if experts else {} for batch in batches]
        self._expert = {
            self._block.name(matrix): expert
            for expert in experts
            if all(expert.down.name in ways for ways in self._ways)
            for matrix in expert.matrices
        }

    def is_short(self, layer: str) -> bool:
        """Whether only the expert is run that a layer, by its name in the model, is in."""
        return layer in self._expert

    def of(self, layer: str) -> Tensor:
        """|y' - y|^2 / |y|^2 of each token, (tokens,), with the layer's weight as it is now and all others
        dense."""
        block, expert = self._block, self._expert.get(layer)
        changes = []
        for batch, ways, dense in zip(self._batches, self._ways, self._dense, strict=True):
            if expert is None:
                moved = block.model.run(block.index, batch).float() - dense
            elif (way := ways[expert.down.name]) is None:
                moved = torch.zeros_like(dense)
            else:
                moved = way.moved(_gives(block, expert, way.tokens)).float()
            changes.append(relative(moved, dense))
        return torch.cat(changes)


def relative(moved: Tensor, dense: Tensor) -> Tensor:
    """|y' - y|^2 / |y|^2 of each token: y' - y and y, (batch, length, hidden), -> (tokens,)."""
    energy = dense.square().sum(dim=-1).clamp_min(torch.finfo(dense.dtype).tiny)
    return (moved.square().sum(dim=-1) / energy).flatten()


def _gives(block: Block, expert: Expert, tokens: Tensor) -> Tensor:
    """What an expert gives for tokens, by the weights as they run now."""
    weight, bias = block.running(expert.down)
    return functional.linear(channels(block, expert, tokens), weight, bias)


def _ways(block: Block, experts: list[Expert], batch: Batch) -> dict[str, _Way | None]:
    """By the name of an expert's last matrix, how a batch's result follows from what that gives: None where
    it does not, as no token goes to the expert. Experts from which it follows otherwise are not among them.
    """
    first = {(e.first[0].weight, e.first[0].expert): e.down.name for e in experts}
    last = {(e.down.weight, e.down.expert): e.down.name for e in experts}
    tokens: dict[str, Tensor] = {}
    gives: dict[str, Tensor] = {}

    def before(weight: str, expert: int | None, given: Tensor) -> None:
        if (name := first.get((weight, expert))) is not None:
            tokens[name] = given.detach()

    def after(weight: str, expert: int | None, product: Tensor) -> Tensor | None:
        if (name := last.get((weight, expert))) is None:
            return None
        gives[name] = product.detach().requires_grad_()
        return gives[name].clone()  # the block may write into it

    model = block.model
    on_device = replace(batch, states=batch.states.to(model.device))
    with torch.enable_grad(), Watch(dict(block.module.named_parameters()), before, after):
        result = model.run_with(block.index, on_device, {})
        v = torch.zeros_like(result, requires_grad=True)
    found: dict[str, _Way | None] = {e.down.name: None for e in experts if e.down.name not in tokens}
    if result.requires_grad:
        gradients = torch.autograd.grad(result, list(gives.values()), v, create_graph=True, allow_unused=True)
        for name, back in zip(gives, gradients, strict=True):
            if back is not None and leaves_of(back).keys() == {id(v)}:
                found[name] = _Way(tokens[name], gives[name].detach(), back, v)
    return found
