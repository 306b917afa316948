"""How far the output of a layer's block moves when something is done to that layer alone.

Errors of layers relative to their own outputs cannot be compared: where half of q's output may be lost
without notice, a tenth of down's may not. What is compared is how far a block's output moves, token by token:

    e_l = mean over tokens t of  |y_t(l changed) - y_t|^2 / |y_t|^2

By the energy of the stream y_t later blocks and the last norm divide, which makes blocks comparable; and
token by token, because a few tokens have most of the energy.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from secateurs.blockwise import Batch
from secateurs.pruning.allocation.change import Change
from secateurs.pruning.allocation.survey import Survey
from secateurs.pruning.solvers.statistics import Statistics

Attempt = Callable[[Tensor, Statistics], Tensor]
"""What a weight (out, in) becomes, with the statistics of its input; it is not modified."""


class Measured(NamedTuple):
    """Of a layer."""

    shape: tuple[int, int]
    """(out, in)."""
    errors: list[float]
    """Of each attempt."""


def measured(survey: Survey, tokens: int, attempts: Sequence[Attempt | None]) -> dict[str, Measured]:
    """Every layer by name, in the order of the walk.

    Args:
        survey: of the dense model.
        tokens: of the calibration text on which errors are measured; whole sequences, at least one.
        attempts: what is done to each layer alone; None is nothing, which has no error.
    """
    found: dict[str, Measured] = {}
    for block in survey.blocks():
        change = Change(survey.model, block.index, _first(block.hidden, tokens))
        errors: dict[str, list[float]] = {}
        # Experts first: what is known of them holds on to weights that follow them.
        for layer in sorted(block.layers, key=lambda layer: not change.is_short(layer.name)):
            own = errors[layer.name] = []
            dense = layer.weight.clone()
            for attempt in attempts:
                if attempt is None:
                    own.append(0.0)
                    continue
                layer.weight.copy_(attempt(dense, layer.statistics))
                own.append(float(change.of(layer.name).mean()))
                layer.weight.copy_(dense)
        for layer in block.layers:
            rows, columns = layer.weight.shape
            found[layer.name] = Measured((rows, columns), errors[layer.name])
    return found


def _first(hidden: list[Batch], tokens: int) -> list[Batch]:
    """Sequences that make so many tokens, at least one, in the batches that they come in."""
    left = max(1, tokens // hidden[0].states.shape[-2])
    first = []
    for batch in hidden:
        if left > 0:
            first.append(Batch.joined(batch.split()[:left]))
            left -= len(batch.at)
    return first
