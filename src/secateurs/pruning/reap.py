"""Which experts a block can do without, by what they add to its result: router-weighted expert activation
pruning (REAP, Lasby et al., arXiv 2510.13999).

An expert's score is the mean, over the tokens that are routed to it, of the router's weight times the norm
of what the expert gives. Those with the lowest go, and then what is left is pruned as usual: experts first,
as in STUN (arXiv 2409.06211).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from secateurs.anatomy import UnsupportedArchitectureError, skeleton
from secateurs.anatomy.fewer import Numbers, numbers_of, sides_of
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import read_config
from secateurs.checkpoint.cut import CutCheckpoint
from secateurs.device import home_of
from secateurs.pruning.record import ChoiceReport


@dataclass(frozen=True)
class Cut:
    """A model of which whole experts are to be dropped."""

    dense: BlockwiseModel
    """With all of them."""
    checkpoint: CutCheckpoint
    """With those that are left, once they are chosen."""
    numbers: Numbers
    count: int
    """Experts that each block keeps."""
    homes: Mapping[int, str]
    """For each block with experts, the module within it that is given tokens and where they go."""

    def keep(self, choice: list[ChoiceReport]) -> None:
        """Let the checkpoint have the experts that were chosen."""
        self.checkpoint.keep(dict(zip(self.homes, (block.kept for block in choice), strict=True)))

    def choose(
        self, tokens: Tensor, batch_size: int, advance: Callable[[str, float | None], None]
    ) -> list[ChoiceReport]:
        """Score all experts on a text, block by block, and keep the best.

        Args:
            tokens: (samples, length) ids.
            batch_size: sequences run at once.
            advance: told of each block.

        Raises:
            FloatingPointError: what experts give is not finite; names them.
        """
        model = self.dense
        hidden = model.embed(tokens, batch_size=batch_size)
        home = home_of([batch.states for batch in hidden], model.device)
        for batch in hidden:
            batch.states = batch.states.to(home)
        choice = []
        for index in range(max(self.homes) + 1):
            path = f"{model.path}.{index}"
            with model.block(index) as block, torch.no_grad():
                sums = torch.zeros(2, self.numbers.count, dtype=torch.float64)
                with _told(block, self.homes.get(index), sums):
                    for batch in hidden:
                        model.push(index, batch)
            if index in self.homes:
                name = f"{path}.{self.homes[index]}"
                scores = sums[0] / sums[1].clamp_min(1)
                if not scores.isfinite().all():
                    raise FloatingPointError(f"what '{name}' gives holds NaN or Inf on the calibration text")
                kept = best(scores, self.count, self.numbers.groups)
                choice.append(ChoiceReport(name, kept, scores.tolist(), sums[1].int().tolist()))
            advance(f"experts of {path}", None)
        return choice


def plan_cut(dense: BlockwiseModel, share: float) -> Cut:
    """How a model is to be cut for a share of each block's experts to be left; no weight is read.

    Raises:
        ValueError: it has no experts, too few would be left, or its routers cannot be cut.
    """
    checkpoint = dense.checkpoint
    numbers, smaller = cut_in_numbers(checkpoint, dense.config, share)
    count = numbers.kept(share)
    sides = sides_of(dense.model, skeleton(read_config(smaller)), dense.path, numbers, count)
    if not sides:
        raise _none_of(checkpoint, dense.config)
    homes: dict[int, str] = {}
    for name, side in sides.items():
        path = f"{dense.path}.{side.block}."
        if dense.model.state_dict()[name].ndim == 3 or side.each > 1:
            homes[side.block] = _home(dense.blocks[side.block], name.removeprefix(path))
    return Cut(
        dense,
        CutCheckpoint(checkpoint, smaller.config, dense.pieces, sides, count),
        numbers,
        count,
        dict(sorted(homes.items())),
    )


def cut_in_numbers(
    checkpoint: Checkpoint, config: PretrainedConfig, share: float
) -> tuple[Numbers, CutCheckpoint]:
    """What a model's configuration says of its experts, and what one says for a share of them.

    Raises:
        ValueError: there are none, or too few would be left.
    """
    numbers = numbers_of(config)
    if numbers is None:
        raise _none_of(checkpoint, config)
    count = numbers.kept(share)
    return numbers, CutCheckpoint(checkpoint, numbers.written(checkpoint.config, count), {}, {}, count)


def _none_of(checkpoint: Checkpoint, config: PretrainedConfig) -> ValueError:
    return ValueError(
        f"'{checkpoint.folder}' ({config.model_type}) has no experts to drop: leave experts out"
    )


def _home(block: nn.Module, parameter: str) -> str:
    """The module that is given tokens for the experts in a parameter of it, or of its child."""
    path = parameter.rpartition(".")[0]
    for name in (path, path.rpartition(".")[0]):
        if len(inspect.signature(block.get_submodule(name).forward).parameters) in (1, 3):
            return name
    raise UnsupportedArchitectureError(
        f"experts cannot be dropped: how '{path}' is given tokens is not understood"
    )


@contextmanager
def _told(block: nn.Module, home: str | None, sums: Tensor) -> Iterator[None]:
    """While a block runs, add up what its experts add to its result.

    Args:
        block: that is materialised.
        home: the experts' module within it; None adds nothing.
        sums: (2, experts): of weight times norm, and of tokens.
    """
    if home is None:
        yield
        return
    module: Any = block.get_submodule(home)
    forward, signature = module.forward, inspect.signature(module.forward)

    def add(index: Tensor, amounts: Tensor) -> None:
        real = index < sums.shape[1]  # beyond are experts that compute nothing
        index, amounts = index[real].cpu(), amounts[real].double().cpu()
        sums[0].index_add_(0, index, amounts)
        sums[1].index_add_(0, index, torch.ones_like(amounts))

    def told(*args: Any, **kwargs: Any) -> Tensor:
        given = list(signature.bind(*args, **kwargs).arguments.values())
        if len(given) == 1:
            result: Tensor = forward(*given)
            add(*_of_all(given[0], result, sums.shape[1]))
            return result
        hidden, index, weights = given
        total = torch.zeros(len(index), hidden.shape[-1], device=hidden.device)
        only = weights.new_tensor([1, 0]).expand(len(index), 2)
        for place, weight in enumerate(weights.float().T):
            # By the model's own code, which for LongCat does not run where there is but one choice.
            result = forward(hidden, index[:, [place, place]], only)
            alone = result.reshape(total.shape).float()
            add(index[:, place], weight * alone.norm(dim=-1))
            total += weight[:, None] * alone
        return total.to(result.dtype).view_as(result)

    module.forward = told
    try:
        yield
    finally:
        del module.forward


def _of_all(given: Tensor, result: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Where all experts are given all tokens, in the order of experts and times the router's weight: those
    that are not routed to one come to it as zeros."""
    routed = given.reshape(experts, -1, given.shape[-1]).any(dim=-1)
    norms = result.reshape(experts, routed.shape[1], -1).float().norm(dim=-1)
    return routed.nonzero()[:, 0], norms[routed]


def best(scores: Tensor, count: int, groups: int) -> list[int]:
    """The numbers of those with the highest scores, rising: equally many of each group of neighbours. Of
    equal ones the earlier."""
    order = scores.view(groups, -1).argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    firsts = torch.arange(groups)[:, None] * (len(scores) // groups)
    return [int(number) for number in (order + firsts).flatten().sort().values]
