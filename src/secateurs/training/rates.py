"""The highest omission rate of the heads and of the channels of every block: one table, given or measured.

Blocks and kinds bear omission unequally (arXiv 2506.16500 finds deep MLPs to bear most, heads and the first
blocks little). Measured, the table spends one budget of multiplications where it is expected to harm the loss
least: what is omitted are the units of least E[(activation * gradient)^2] for their weights, the diagonal of
the empirical Fisher matrix at a unit's output. It is one backward pass, and it compares across blocks and
kinds, which the loss itself does not: on text that is new to a model, leaving things out may well lower it.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from secateurs.training.cutting import Block, Cutting, shape_of
from secateurs.training.importance import Scores
from secateurs.training.units import KINDS, Kind, multiple_of

Rates = list[dict[Kind, float]]
"""For each block, and kind that it has units of, the share of them to omit."""

MOST = 0.9
"""The most that a measured table omits of a block's heads or channels."""


def given_rates(cutting: Cutting, rates: dict[Kind, float], exempt: Collection[int]) -> Rates:
    """The same rates for every block but those that run whole.

    Raises:
        ValueError: a block to exempt does not exist.
    """
    whole = _block_indices(exempt, len(cutting.blocks))
    return [
        {kind: 0.0 if number in whole else rates[kind] for kind in block.units}
        for number, block in enumerate(cutting.blocks)
    ]


def measured_rates(cutting: Cutting, costs: Scores, budget: float, exempt: Collection[int]) -> Rates:
    """Rates that omit a share of all multiplications with weights that can be omitted, at the least cost.

    Args:
        cutting: of the model.
        costs: what each unit's omission is expected to cost.
        budget: that share, in [0, 1). At most MOST of any block's units of a kind are omitted, so that a
            high budget may be spent in part only.
        exempt: blocks that run whole. What they would have omitted the others do.

    Raises:
        ValueError: a block to exempt does not exist, or costs are not finite, or all 0.
    """
    whole = _block_indices(exempt, len(cutting.blocks))
    cells = [(number, kind) for number, block in enumerate(cutting.blocks) for kind in block.units]
    prices: list[Tensor] = []
    weights: list[Tensor] = []
    owners: list[Tensor] = []
    for cell, (number, kind) in enumerate(cells):
        units = cutting.blocks[number].units[kind]
        step = multiple_of(kind, units)
        steps = 0 if number in whole else int(MOST * units.size) // step
        # Of groups each omits as many, its cheapest first.
        ascending = costs[number][kind].double().sort(1).values.sum(0)[: steps * step]
        size = step * units.groups * _weights_of_a_unit(cutting.blocks[number], kind)
        prices.append(ascending.view(steps, step).sum(1) / size)
        weights.append(torch.full((steps,), size, dtype=torch.float64))
        owners.append(torch.full((steps,), cell))
    price, weight, owner = torch.cat(prices), torch.cat(weights), torch.cat(owners)
    if not price.isfinite().all() or (len(price) and not price.any()):
        raise ValueError("rates cannot be measured: the first batch's loss has no gradient, or no finite one")
    order = price.argsort(stable=True)
    total = sum(
        block.units[kind].count * _weights_of_a_unit(block, kind)
        for block in cutting.blocks
        for kind in block.units
    )
    affordable = int((weight[order].cumsum(0) <= budget * total + 0.5).sum())
    taken = torch.bincount(owner[order[:affordable]], minlength=len(cells)).tolist()
    rates: Rates = [{} for _ in cutting.blocks]
    for (number, kind), steps in zip(cells, taken, strict=True):
        units = cutting.blocks[number].units[kind]
        rates[number][kind] = steps * multiple_of(kind, units) / units.size
    return rates


def described(rates: Rates) -> dict[Kind, list[float | None]]:
    """By kind the rate of each block, rounded, for a record; None where it has no such units."""
    return {
        kind: [round(of[kind], 4) if kind in of else None for of in rates]
        for kind in KINDS
        if any(kind in of for of in rates)
    }


def _block_indices(exempt: Collection[int], blocks: int) -> set[int]:
    for index in exempt:
        if not -blocks <= index < blocks:
            raise ValueError(f"cannot exempt block {index}: the model has blocks 0 to {blocks - 1}")
    return {index % blocks for index in exempt}


def _weights_of_a_unit(block: Block, kind: Kind) -> float:
    """How many weights are not multiplied with if it is omitted."""
    sliced = sum(
        shape_of(layer.slices[0].parameter).numel() * float((layer.unit >= 0).double().mean())
        for layer in block.layers[kind]
    )
    return sliced / block.units[kind].count
