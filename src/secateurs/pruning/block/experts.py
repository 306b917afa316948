"""The experts of a block, each an MLP of its own on the tokens that are routed to it.

Few tokens reach some experts, fewer than they have inputs. So each also sees as many tokens as it has inputs
drawn from all: its second moment is shrunk towards that of all tokens, H = (c H_routed + k H_all) / (c + k)
for its c tokens, which where experts starve is better than theirs alone, and where they do not costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateurs.anatomy import MLP, Matrix, UnsupportedArchitectureError
from secateurs.blockwise import Batch
from secateurs.pruning.block.block import Block
from secateurs.pruning.block.measure import observe


@dataclass(frozen=True)
class Expert:
    """One of a block's experts."""

    first: tuple[Matrix, ...]
    """Those that read the tokens."""
    down: Matrix
    mlp: MLP | None
    """What it is as an MLP, if that was understood."""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (*self.first, self.down)


@dataclass(frozen=True)
class Experts:
    """All experts of one module."""

    home: str
    """The module's path within the block."""
    members: tuple[Expert, ...]
    """By number."""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(matrix for expert in self.members for matrix in expert.matrices)


def experts_of(block: Block) -> list[Experts]:
    """The experts of a block, in the order of the forward pass."""
    anatomy = block.anatomy
    mlps = {matrix.name: mlp for mlp in anatomy.mlps for matrix in (*mlp.first, mlp.down)}
    homes: dict[str, dict[int, list[Matrix]]] = {}
    for matrix in anatomy.matrices.values():
        if matrix.expert is not None:
            mlp = mlps.get(matrix.name)
            home = (matrix if mlp is None else mlp.down).weight.rpartition(".")[0]
            homes.setdefault(home, {}).setdefault(matrix.expert, []).append(matrix)
    return [
        Experts(
            home,
            tuple(
                Expert(tuple(first), down, mlps.get(down.name))
                for _, (*first, down) in sorted(numbers.items())
            ),
        )
        for home, numbers in homes.items()
    ]


@dataclass(frozen=True)
class Routed:
    """What the experts of one module are given of the calibration text."""

    own: list[list[Tensor]]
    """For each expert its tokens, (tokens, in) for each batch."""
    drawn: Tensor
    """(in, in): as many tokens as there are inputs, of all that are routed anywhere."""

    def counts(self) -> list[int]:
        """Tokens of each expert."""
        return [sum(len(tokens) for tokens in own) for own in self.own]

    def tokens(self, expert: int) -> list[Tensor]:
        """What an expert is to be pruned by: its own tokens and those drawn for all."""
        return [*(tokens for tokens in self.own[expert] if len(tokens)), self.drawn]


def route(block: Block, hidden: list[Batch], experts: Experts) -> Routed:
    """Run a block, and note what each expert is given.

    Memory: each token as often as it is routed, in the dtype of the model, where the activations live.
    """
    firsts = [expert.first[0] for expert in experts.members]
    own: list[list[Tensor]] = [[] for _ in firsts]
    for batch, seen in zip(hidden, observe(block.model, block.index, hidden, inputs=firsts), strict=True):
        for tokens, matrix in zip(own, firsts, strict=True):
            given = seen.inputs.get(matrix.name)
            if given is not None:
                flat = given.reshape(-1, given.shape[-1])
                # Where all experts run on all tokens, what is not routed to one comes to it as zeros.
                tokens.append(flat[flat.any(1)].to(batch.states.device))
    pool = [tokens for expert in own for tokens in expert]
    count, width = sum(map(len, pool)), firsts[0].shape[1]
    generator = torch.Generator().manual_seed(block.index)
    chosen = torch.randperm(count, generator=generator)[:width].sort().values
    starts = torch.tensor([0, *map(len, pool)]).cumsum(0)
    drawn = [
        tokens[chosen[(chosen >= start) & (chosen < start + len(tokens))] - start]
        for tokens, start in zip(pool, starts[:-1].tolist(), strict=True)
    ]
    return Routed(own, torch.cat(drawn))


def channels_of(block: Block, expert: Expert) -> Callable[[Tensor], Tensor]:
    """What makes an expert's channels of what its first matrices give, (tokens, out) each, side by side."""
    mlp, home = expert.mlp, expert.down.weight.rpartition(".")[0]
    module: Any = block.module.get_submodule(home)
    if hasattr(module, "_apply_gate"):
        function: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn
        return function
    if mlp is None or mlp.activation is None:
        raise UnsupportedArchitectureError(
            f"what the experts of '{block.path}.{home}' compute is not understood"
        )
    activation, gated = block.activation(mlp), mlp.gated

    def channels(products: Tensor) -> Tensor:
        if not gated:
            return activation(products)
        gate, up = products.chunk(2, dim=-1)
        return activation(gate) * up

    return channels
