"""The experts of a block, each an MLP of its own on the tokens that are routed to it.

Few tokens reach some experts, fewer than they have inputs. So each also sees as many tokens as it has inputs
drawn from all: its second moment is shrunk towards that of all tokens, H = (c H_routed + k H_all) / (c + k)
for its c tokens, which where experts starve is better than theirs alone, and where they do not costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateurs import ranks
from secateurs.anatomy import MLP, Matrix, UnsupportedArchitectureError
from secateurs.anatomy.products import storage_of
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


class Rows(NamedTuple):
    """Some rows of a tensor that others take rows of, too."""

    source: Tensor
    """(tokens, in)."""
    at: Tensor
    """(rows,): which of them."""

    def gathered(self) -> Tensor:
        """(rows, in): a copy."""
        return self.source[self.at]


@dataclass(frozen=True)
class Routed:
    """What the experts of one module are given of the calibration text."""

    own: list[list[Rows]]
    """For each expert its tokens, for each batch."""
    drawn: Tensor
    """(in, in): as many tokens as there are inputs, of all that are routed anywhere."""

    def counts(self) -> list[int]:
        """Tokens of each expert, those of all ranks."""
        counts = [sum(len(rows.at) for rows in own) for own in self.own]
        return ranks.summed(torch.tensor(counts)).tolist()

    def tokens(self, expert: int) -> list[Tensor]:
        """What an expert is to be pruned by: its own tokens and those drawn for all."""
        return [*(rows.gathered() for rows in self.own[expert] if len(rows.at)), self.drawn]


def route(block: Block, hidden: list[Batch], experts: Experts) -> Routed:
    """Run a block, and note what each expert is given.

    Memory: each token once, in the dtype of the model, where the activations live, and eight bytes as often
    as it is routed. Where experts are given more than rows of one tensor (in Llama 4, tokens times the
    router's weight), each token as often as it is routed.
    """
    firsts = [expert.first[0] for expert in experts.members]
    own: list[list[Rows]] = [[] for _ in firsts]
    for batch in hidden:
        gathering = Gathering()
        with gathering:
            seen = next(observe(block.model, block.index, [batch], inputs=firsts))
        home = batch.states.device
        moved: dict[int, Tensor] = {}  # what experts take rows of, where it is kept
        for parts, matrix in zip(own, firsts, strict=True):
            given = seen.inputs.get(matrix.name)
            if given is None:
                continue
            flat = given.reshape(-1, given.shape[-1])
            # Where all experts run on all tokens, what is not routed to one comes to it as zeros.
            routed = flat.any(1)
            rows = gathering.rows(flat)
            if rows is None:
                tokens = flat[routed].to(home)
                parts.append(Rows(tokens, torch.arange(len(tokens), device=home)))
            else:
                source = moved.setdefault(id(rows.source), rows.source.to(home))
                parts.append(Rows(source, rows.at[routed].to(home)))
    pool = [rows for parts in own for rows in parts]
    sizes = [len(rows.at) for rows in pool]
    count = ranks.part_of(firsts[0].shape[1])
    generator = torch.Generator().manual_seed(block.index)
    chosen = torch.randperm(sum(sizes), generator=generator)[:count].sort().values
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    drawn = [
        rows.source[rows.at[chosen[(chosen >= start) & (chosen < end)] - start]]
        for rows, start, end in zip(pool, starts[:-1], starts[1:], strict=True)
    ]
    return Routed(own, torch.cat(drawn))


class Gathering(TorchFunctionMode):
    """Notes which tensors are rows of others, as code takes them by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[int, tuple[Tensor, Rows]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
            source, at = args
            if (source.ndim, at.ndim, at.dtype) == (2, 1, torch.long):
                self._taken[storage_of(result)] = result, Rows(source, at)
        return result

    def rows(self, tensor: Tensor) -> Rows | None:
        """Which rows of another (tokens, in) a tensor (rows, in) is, if it is nothing else."""
        _, taken = self._taken.get(storage_of(tensor), (None, None))
        if taken is None or not tensor.is_contiguous():
            return None
        first = int(tensor.storage_offset()) // taken.source.shape[1]
        rows = Rows(taken.source, taken.at[first : first + len(tensor)])
        # It may have been written to, or cut otherwise.
        return rows if torch.equal(rows.gathered(), tensor) else None


def channels(block: Block, expert: Expert, tokens: Tensor) -> Tensor:
    """What an expert's last matrix is given for tokens (tokens, in), by the weights as they run now.

    Returns:
        (tokens, channels), where the block runs.

    Raises:
        UnsupportedArchitectureError: what the expert computes is not understood.
    """
    function, products = _function_of(block, expert), []
    for matrix in expert.first:
        weight, bias = block.running(matrix)
        product = functional.linear(tokens.to(weight.device), weight, bias)
        added = None if bias is not None else _bias_beside(block, matrix)
        products.append(product if added is None else product + added)
    return function(torch.cat(products, dim=-1))


def _bias_beside(block: Block, matrix: Matrix) -> Tensor | None:
    """What transformers' experts add to a product after it, so that it is not seen to be the matrix's."""
    home, _, leaf = matrix.weight.rpartition(".")
    module: Any = block.module.get_submodule(home)
    if not getattr(module, "has_bias", False):
        return None
    bias: Tensor = getattr(module, f"{leaf}_bias")[matrix.expert]
    return bias


def _function_of(block: Block, expert: Expert) -> Callable[[Tensor], Tensor]:
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

    def of_mlp(products: Tensor) -> Tensor:
        if not gated:
            return activation(products)
        gate, up = products.chunk(2, dim=-1)
        return activation(gate) * up

    return of_mlp
