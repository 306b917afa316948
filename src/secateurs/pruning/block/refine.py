"""Gradient descent on what is left of a block, its zeros held: attention and MLP at once.

Local solvers and SparseLLM's fits see a layer or the MLP, through least squares. A last look at the whole
block, nonlinear as it is, recovers some of what they cannot (Guo et al., EBFT, arXiv 2402.12419, tunes
pruned blocks in the same way).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from secateurs import ranks
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.device import multiplies_bfloat16

TOKENS_A_STEP = 512

SHORTEST = 128
"""Tokens that a sequence shows at least, of those that it has, however many ranks share a step."""

STEPS_OF_A_PASS = 32
"""A text of fewer steps than these is not gone through the more often for it."""

ALIKE = 1e-5
"""The share of the energy of what a block adds to a token that rounding may account for, in float32."""

JUDGES = 8
"""One sequence in so many, and at least one, tells whether the descent gained anything. It is shown to it, as
it was to the fits before: judged on sequences that these alone have seen, a descent that does well on other
text would seem to lose. Few passes keep it from learning the sequences by heart."""

RATE = 3.0
"""The largest that a step may be, relative to the root mean square of the weights that it changes, times the
width: the wider a block, the more weights move its result together."""

MOST_RATE = 0.0125
"""For narrow blocks."""

WARM_UP = 20
"""Steps until Adam's second moments may be trusted with the whole rate; in a short run a quarter of them."""


def shown_tokens(world: int) -> int:
    """Of a sequence, how many tokens a step sees at most: as many as leave one to each of the ranks."""
    return max(SHORTEST, TOKENS_A_STEP // world)


class Refined(NamedTuple):
    """What descent found for a block."""

    parameters: dict[str, Tensor] | None
    """By their names in the block, in the dtypes they are stored in; None where they are no better."""
    before: float
    """Squared error of the block's result on the sequences that judge, relative to the energy of what the
    block is asked to add: its target less its input."""
    after: float | None
    """The same with what was found; None where that is not finite."""
    tokens: int
    """Of each sequence that it was shown: the first ones."""


def passes_for(steps: int, samples: int, length: int) -> int:
    """Over so many sequences of so many tokens, for about so many steps; at least one."""
    of_a_pass = math.ceil(samples / _together(min(length, TOKENS_A_STEP)))
    return max(1, round(steps / max(of_a_pass, STEPS_OF_A_PASS)))


def refine(
    model: BlockwiseModel,
    index: int,
    stored: dict[str, Tensor],
    hidden: list[Batch],
    targets: list[Tensor],
    *,
    passes: int,
) -> Refined:
    """Train some parameters of a materialised block towards a target. The block itself stays as it is.

    Adam on float32 weights, at a rate that rises for some steps and then falls linearly to zero; a step sees
    `TOKENS_A_STEP` tokens, or one sequence, and multiplies them in bfloat16 where the model does and the
    device is fast at it. Ranks share the sequences of a step, which for that shows less of each; where there
    are fewer, they take turns: with more to a step there would be fewer steps, and the result worse. A step's
    gradient is that of all. Matrices keep their zeros. Memory: about twice the block's parameters in
    float32, six times what is left of them besides, over ranks eight times, and the activations of one step.

    Args:
        model: whose block it is.
        index: of the block.
        stored: the parameters to train, by their names within the block, as they stand in the files: the
            result is judged as it is rounded to their dtypes.
        hidden: what the block is given.
        targets: what it ought to give, a (batch, length, hidden) tensor for each batch.
        passes: over the sequences, as one process makes them; where they are longer than a step and the model
            was asked to note that (`BlockwiseModel.embed`), over what they begin with.

    Raises:
        FloatingPointError: the block's result is not finite before anything is changed.
    """
    pairs = [
        pair
        for given, wanted in zip(hidden, targets, strict=True)
        for pair in zip(given.split(), given.split_like(wanted), strict=True)
    ]
    judges = pairs[::JUDGES]
    parameters = {
        name: parameter.detach().float() for name, parameter in model.blocks[index].named_parameters()
    }
    shown = _heads(model, index, pairs, parameters)
    seen = model.length if shown is pairs or model.head is None else model.head.length
    together = _together(seen)
    low = hidden[0].states.dtype == torch.bfloat16 and multiplies_bfloat16(model.device)
    left = _Left(stored, model.device, torch.bfloat16 if low else torch.float32)
    parameters |= left.parameters

    def lost(some: Sequence[tuple[Batch, Tensor]], weights: dict[str, Tensor], energy: float) -> Tensor:
        given = Batch.joined([batch for batch, _ in some])
        given.states = given.states.to(model.device).float()
        wanted = torch.cat([tensor for _, tensor in some], dim=given.axis).to(model.device).float()
        # Within a caller's autocast a cache would keep what the first step multiplied by.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            result = model.run_with(index, given, weights)
        return (result - wanted).square().sum() / (energy * len(some))

    of_whole, of_shown = _energy(pairs), _energy(shown)
    judging = ranks.total(len(judges))

    @torch.no_grad()
    def error(weights: dict[str, Tensor]) -> float:
        return ranks.total(sum(float(lost([pair], weights, of_whole)) for pair in judges)) / judging

    before = error(parameters)
    if not math.isfinite(before):
        raise FloatingPointError("the result of the pruned block is not finite on the calibration text")
    count = int(ranks.total(len(shown)))
    # As many as one process makes, which is shown more of each sequence and goes through them less often.
    steps = passes * math.ceil(count / _together(min(model.length, TOKENS_A_STEP)))
    warm_up = min(WARM_UP, 1 + steps // 4)
    rate = min(MOST_RATE, RATE / hidden[0].states.shape[-1])
    optimiser = torch.optim.Adam(
        [{"params": [vector], "lr": rate * _typical(vector)} for vector in left.vectors],
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / warm_up) * (1 - step / steps)
    )
    order = torch.Generator().manual_seed(index)
    with torch.enable_grad():
        for own in islice(_of_steps(len(shown), count, together, order), steps):
            some = [shown[i] for i in own]
            if some:
                lost(some, parameters, of_shown).backward()
            left.take_gradients(len(some))
            optimiser.step()
            left.put()
            schedule.step()
    del optimiser, schedule
    # Rounding may bring small negative weights to -0; adding 0 makes it +0.
    result = {name: left.whole(name).to(tensor.dtype) + 0 for name, tensor in stored.items()}
    after = error(parameters | {name: parameter.float() for name, parameter in result.items()})
    return Refined(result if after < before else None, before, after if math.isfinite(after) else None, seen)


class _Left:
    """What is left of some parameters, a vector of each, which is all that is to be stepped on and sent.

    Args:
        stored: the parameters, by name. Zeros of those with a single dimension are weights like others.
        device: to work on.
        multiplied: the dtype that matrices are multiplied in, and so that they and their gradients are in.
    """

    def __init__(self, stored: Mapping[str, Tensor], device: torch.device, multiplied: torch.dtype) -> None:
        self.parameters: dict[str, Tensor] = {}
        """What the block is to have, with gradients."""
        self._vectors: dict[str, Tensor] = {}
        self._places: dict[str, Tensor | None] = {}
        for name, tensor in stored.items():
            dtype = multiplied if tensor.ndim > 1 else torch.float32
            whole = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
            self.parameters[name] = whole.requires_grad_()
            flat = tensor.to(device, torch.float32).flatten()
            places = flat.nonzero()[:, 0] if tensor.ndim > 1 and not flat.all() else None
            self._places[name] = places
            self._vectors[name] = flat.clone() if places is None else flat.index_select(0, places)

    @property
    def vectors(self) -> list[Tensor]:
        """To step on, float32."""
        return list(self._vectors.values())

    def take_gradients(self, weight: int) -> None:
        """Give the vectors the mean of all ranks' gradients of the parameters, and let go of these.

        Args:
            weight: what this rank's count: its sequences. Without any, it has no gradients.
        """
        gradients = []
        for name, parameter in self.parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            places = self._places[name]
            own = gradient.view(-1) if places is None else gradient.view(-1).index_select(0, places)
            gradients.append(own.float())
            parameter.grad = None
        for vector, gradient in zip(self.vectors, ranks.averaged(gradients, weight), strict=True):
            vector.grad = gradient

    @torch.no_grad()
    def put(self) -> None:
        """Put the vectors where they are in the parameters."""
        for name, vector in self._vectors.items():
            self._put(self.parameters[name], name, vector)

    def whole(self, name: str) -> Tensor:
        """A parameter as it has become, float32."""
        whole = torch.zeros_like(self.parameters[name], dtype=torch.float32)
        return self._put(whole, name, self._vectors[name])

    def _put(self, whole: Tensor, name: str, vector: Tensor) -> Tensor:
        places, flat = self._places[name], whole.view(-1)
        if places is None:
            flat.copy_(vector)
        else:
            flat.index_copy_(0, places, vector.to(flat.dtype))
        return whole


def _of_steps(own: int, of_all: int, together: int, order: torch.Generator) -> Iterator[list[int]]:
    """Which of a rank's sequences a step sees, in one random order of them after the other.

    Args:
        own: sequences.
        of_all: those of all ranks.
        together: how many of these a step sees.
    """
    while True:
        chosen = torch.randperm(own, generator=order).tolist()
        for start in range(0, of_all, together):
            yield chosen[ranks.part_of(start) : ranks.part_of(start + together)]


def _energy(pairs: list[tuple[Batch, Tensor]]) -> float:
    """Of what a block is asked to add to a sequence, on average; 1 where that is nothing."""
    energy = sum(float((wanted.float() - given.states.float()).square().sum()) for given, wanted in pairs)
    return ranks.total(energy) / ranks.total(len(pairs)) or 1.0


def _heads(
    model: BlockwiseModel,
    index: int,
    pairs: list[tuple[Batch, Tensor]],
    parameters: dict[str, Tensor],
) -> list[tuple[Batch, Tensor]]:
    """Of sequences that are longer than a step what they begin with, if the model has noted that.

    A step is then a step, and attention costs less. But only where the block gives for a beginning by itself
    what it gives for it within the whole: not where earlier blocks have left it something, nor where
    positions count by the length.
    """
    head, first = model.head, pairs[0][0]
    if head is None or first.shared:
        return pairs
    whole = replace(first, states=first.states.to(model.device).float())
    begun = head.of(whole)
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        alone = model.run_with(index, begun, parameters)
        within = head.of_tensor(model.run_with(index, whole, parameters))
    # By token: a single one may have nearly all of the energy.
    moved = (alone - within).square().sum(dim=-1) / (within - begun.states).square().sum(dim=-1)
    if ranks.total(not moved.median() <= ALIKE):
        return pairs
    return [(head.of(given), head.of_tensor(wanted)) for given, wanted in pairs]


def _together(length: int) -> int:
    """Sequences that a step sees."""
    return max(1, TOKENS_A_STEP // length)


def _typical(parameter: Tensor) -> float:
    """The root mean square of what is not zero; for a bias of zeros, that of a small one."""
    used = parameter[parameter != 0]
    return float(used.square().mean().sqrt()) if used.numel() else 1e-2
