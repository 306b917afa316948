"""What is omitted does not move, whatever the optimiser; what wakes late takes a step of the right size."""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer
from transformers import PreTrainedModel
from transformers.optimization import Adafactor as TransformersAdafactor

from families import build, tokens
from secateurs.training.cutting import Kept
from secateurs.training.frozen import FrozenOptimizer
from secateurs.training.omission import Omission
from secateurs.training.units import KINDS, Kind

Parameters = Iterable[nn.Parameter]

OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adam-amsgrad": lambda p: Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "sgd": lambda p: SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov-fused": lambda p: SGD(p, lr=1e-2, momentum=0.9, nesterov=True, fused=True),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, weight_decay=0.1),
    "adafactor-transformers": lambda p: TransformersAdafactor(p, lr=1e-2, relative_step=False),
}


def halves(omission: Omission, first: bool) -> list[dict[Kind, Tensor | None]]:
    """The first or the second half of all units."""
    kept: list[dict[Kind, Tensor | None]] = []
    for block in omission.blocks:
        masks: dict[Kind, Tensor | None] = {}
        for kind, units in block.units.items():
            mask = torch.zeros(units.groups, units.size, dtype=torch.bool)
            mask[:, : units.size // 2] = True
            masks[kind] = mask if first else ~mask
        kept.append(masks)
    return kept


def counts(omission: Omission, kept: Kept, inside: int, outside: int) -> list[dict[Kind, Tensor]]:
    return [{kind: torch.where(masks[kind], inside, outside) for kind in KINDS} for masks in kept]


def train(model: PreTrainedModel, optimizer: Optimizer, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        ids = tokens(seed=seed + step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def omitted_slices(omission: Omission) -> list[Tensor]:
    """Copies of the omitted slices of the whole parameters."""
    return [
        piece.parameter.detach().index_select(piece.dim, piece.order[len(piece.index) :]).clone()
        for piece in omission.slices
        if piece.index is not None
    ]


def omitted_state(optimizer: Optimizer, omission: Omission) -> list[Tensor]:
    """Copies of the omitted slices of state that has the parameter's shape."""
    return [
        value.index_select(piece.dim, piece.order[len(piece.index) :]).clone()
        for piece in omission.slices
        if piece.index is not None
        for value in optimizer.state[piece.parameter].values()
        if isinstance(value, Tensor) and value.shape == piece.parameter.shape
    ]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["llama-bias", "gpt2"])
def test_omitted_neurons_and_their_state_stay_bit_identical(
    name: str, optimizer: str, in_place: bool
) -> None:
    model = build(name)
    made = OPTIMIZERS[optimizer](model.parameters())
    omission = Omission(model, in_place=in_place)
    frozen = FrozenOptimizer(made, omission)
    train(model, made, 3)  # so that there is momentum everywhere
    omission.disengage()
    kept = halves(omission, first=True)
    omission.choose(kept)
    frozen.choose(counts(omission, kept, 3, 3))
    before, state = omitted_slices(omission), omitted_state(made, omission)
    embedding = model.get_input_embeddings().weight.detach().clone()
    omission.engage()
    train(model, made, 3, seed=3)
    omission.disengage()
    frozen.widen()
    for old, new in zip(before, omitted_slices(omission), strict=True):
        assert torch.equal(old, new)
    for old, new in zip(state, omitted_state(made, omission), strict=True):
        assert torch.equal(old, new)
    for piece in omission.slices:
        assert made.state[piece.parameter]
    assert not torch.equal(embedding, model.get_input_embeddings().weight)
    frozen.detach()
    train(model, made, 1)  # plain again
    assert not torch.equal(before[0], omitted_slices(omission)[0])


def first_updates(
    model: PreTrainedModel, optimizer: Optimizer, in_place: bool, slept: int
) -> Iterator[tuple[str, Tensor]]:
    """By how much one step moves the units of the second half, which slept for the steps made so far."""
    omission = Omission(model, in_place=in_place)
    frozen = FrozenOptimizer(optimizer, omission)
    kept = halves(omission, first=False)
    omission.choose(kept)
    frozen.choose(counts(omission, kept, 0, slept))
    pieces = [piece for piece in omission.slices if piece.index is not None]
    before = {piece: piece.parameter.detach().clone() for piece in pieces}
    omission.engage()
    train(model, optimizer, 1, seed=99)
    omission.disengage()
    frozen.detach()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for piece, old in before.items():
        update = piece.parameter.detach() - old
        yield names[id(piece.parameter)], update.index_select(piece.dim, piece.index)


@pytest.mark.parametrize(
    ("optimizer", "in_place"),
    [*((name, True) for name in OPTIMIZERS if "adafactor" not in name), ("adamw", False)],
)
def test_the_first_update_after_a_long_sleep_is_that_of_a_fresh_optimiser(
    optimizer: str, in_place: bool
) -> None:
    model = build("llama-bias")
    made = OPTIMIZERS[optimizer](model.parameters())
    omission = Omission(model, in_place=in_place)
    frozen = FrozenOptimizer(made, omission)
    kept = halves(omission, first=True)
    omission.choose(kept)
    frozen.choose(counts(omission, kept, 0, 0))
    omission.engage()
    train(model, made, 40)
    omission.disengage()
    frozen.detach()
    twin = deepcopy(model)
    late = dict(first_updates(model, made, in_place, slept=40))
    fresh = dict(first_updates(twin, OPTIMIZERS[optimizer](twin.parameters()), in_place, slept=0))
    assert len(late) > 3 * len(omission.blocks)
    for name, update in late.items():
        assert float(update.norm() / fresh[name].norm()) == pytest.approx(1, abs=0.05), name
        cosine = nn.functional.cosine_similarity(update.flatten(), fresh[name].flatten(), dim=0)
        assert float(cosine) > 0.95, name


def test_a_dense_step_after_sparse_ones_corrects_those_that_slept() -> None:
    """As at the end of a ladder. In the limit of long sleep Adam's first step is 0.316 of that without."""
    model = build("llama")
    updates = []
    for slept in (0, 10_000):
        twin = deepcopy(model)
        made = AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-16)
        omission = Omission(twin, in_place=True)
        frozen = FrozenOptimizer(made, omission)
        frozen.steps = slept
        for parameter in twin.parameters():
            zeros = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            made.state[parameter] = {"step": torch.tensor(float(slept)), **zeros}
        kept: Kept = [dict.fromkeys(KINDS) for _ in omission.blocks]
        omission.choose(kept)
        frozen.choose(counts(omission, halves(omission, first=True), 0, 0))
        before = twin.model.layers[0].mlp.up_proj.weight.detach().clone()
        train(twin, made, 1)
        updates.append(twin.model.layers[0].mlp.up_proj.weight.detach() - before)
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if "adafactor" in name])
def test_adafactor_moves_those_that_slept_like_those_that_did_not(optimizer: str) -> None:
    model = build("llama")
    made = OPTIMIZERS[optimizer](model.parameters())
    omission = Omission(model, in_place=True)
    frozen = FrozenOptimizer(made, omission)
    kept = halves(omission, first=True)
    omission.choose(kept)
    omission.engage()
    train(model, made, 40)
    omission.disengage()
    frozen.widen()
    mixed = [{"attention": None, "mlp": masks["mlp"].roll(20)} for masks in kept]
    omission.choose(mixed)  # channels 20 to 39, which ran, and 40 to 59, which slept
    frozen.choose(counts(omission, kept, 40, 0))
    omission.engage()
    for layer in model.model.layers:
        before = layer.mlp.up_proj.weight.detach().clone()
        train(model, made, 1, seed=99)
        update = layer.mlp.up_proj.weight.detach() - before
        # Without the others' moments to start from, those that slept would move four times as far.
        assert float(update[20:].norm() / update[:20].norm()) == pytest.approx(1, abs=0.4)


def test_an_optimiser_whose_state_cannot_be_sliced_is_refused() -> None:
    class Blockwise(SGD):  # as 8-bit optimisers do: one scale for every so many values
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["scales"] = torch.ones(parameter.numel() // 4, 1, 1)

    model = build("llama")
    made = Blockwise(model.parameters(), lr=1e-2)
    omission = Omission(model, in_place=True)
    FrozenOptimizer(made, omission)
    omission.choose(halves(omission, first=True))
    omission.engage()
    train(model, made, 1)
    with pytest.raises(ValueError, match=r"Blockwise keeps 'scales' of shape \(192, 1, 1\).*AdamW"):
        train(model, made, 1)
