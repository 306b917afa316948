"""Pruning that adapts during training: what falls and when, against what is written naively here."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_callback import BATCH, lora, losses_of, tokenizer, trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from transformers import Trainer, TrainerCallback

import decoders
from families import build, tokens
from secateurs.pattern import NM, Unstructured
from secateurs.training.adaptive import AdaptivePruning, shares_of
from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.falling import choose
from secateurs.training.masks import places_of
from secateurs.training.sparse import SparseTraining

STEPS = 10
QUICK: dict[str, Any] = {"start": 0.2, "end": 0.8, "every": 2}


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """(out, in) each, by name in the plain model."""
    return {
        place.name: place.matrix.of(place.parameter.detach())
        for places in places_of(model).values()
        for place in places
    }


def zeros(model: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in matrices(model).values())


def size(model: nn.Module) -> int:
    return sum(weight.numel() for weight in matrices(model).values())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, pruning: AdaptivePruning, steps: int, sat: Any = None
) -> list[int]:
    """Zeros after each step."""
    found = []
    model.train()
    for step in range(steps):
        ids = tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if sat is not None:
            sat.step()
        pruning.step()
        optimizer.zero_grad()
        found.append(round(pruning.sparsity * size_of(pruning)))
    return found


def size_of(pruning: AdaptivePruning) -> int:
    return sum(held.numel() for held in (pruning.masks.held(name) for name in pruning.masks.state_dict()))


@pytest.mark.parametrize(("schedule", "power"), [("cubic", 3), ("linear", 1)])
def test_sparsity_rises_by_its_closed_form(schedule: Any, power: int) -> None:
    model = build("llama")
    optimizer = AdamW(model.parameters(), lr=1e-3)
    pruning = AdaptivePruning("70%", start=2, end=8, every=2, schedule=schedule)
    pruning.attach(model, optimizer, total_steps=STEPS)
    found = train(model, optimizer, pruning, STEPS)
    total, after = size(model), {4: 1 / 3, 6: 2 / 3, 8: 1.0}  # an update every two steps after the second
    share = 0.0
    for step, count in enumerate(found, start=1):
        share = 0.7 * (1 - (1 - after[step]) ** power) if step in after else share
        assert count == round(share * total)
    assert zeros(model) == round(0.7 * total)


def test_zeros_that_a_model_has_stay_and_count() -> None:
    model = build("llama")
    with torch.no_grad():
        for weight in matrices(model).values():
            weight[weight.abs() < weight.abs().quantile(0.4)] = 0
    before = {name: weight == 0 for name, weight in matrices(model).items()}
    optimizer = AdamW(model.parameters(), lr=1e-3)
    pruning = AdaptivePruning("60%", start=0, end=4, every=1)
    pruning.attach(model, optimizer, total_steps=5)
    first, *_ = train(model, optimizer, pruning, 5)
    now = sum(int(zero.sum()) for zero in before.values())
    total = size(model)
    assert first == round(total * (0.6 + (now / total - 0.6) * 0.75**3))
    assert zeros(model) == round(0.6 * total)
    for name, weight in matrices(model).items():
        assert not weight[before[name]].any()


def naive(scores: Tensor, pattern: Any, count: int) -> Tensor:
    """One by one, lowest first; of n:m only what is not among the best n of its m. No scores are equal."""
    keep = np.ones(scores.shape, dtype=bool)
    best = np.zeros(scores.shape, dtype=bool)
    if isinstance(pattern, NM):
        for row in range(scores.shape[0]):
            for first in range(0, scores.shape[1], pattern.m):
                group = scores[row, first : first + pattern.m].tolist()
                for place in sorted(range(pattern.m), key=lambda i: -group[i])[: pattern.n]:
                    best[row, first + place] = True
    fallen = 0
    for place in np.argsort(scores.flatten().numpy(), kind="stable"):
        if fallen < count and not best.flat[place]:
            keep.flat[place] = False
            fallen += 1
    return torch.from_numpy(keep)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4), NM(1, 8)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_the_lowest_fall(pattern: Any, share: float) -> None:
    scores = torch.rand(12, 32, generator=torch.Generator().manual_seed(1))
    count = round(share * pattern.sparsity * scores.numel())
    keep = choose(scores, pattern, count)
    assert torch.equal(keep, naive(scores, pattern, count))
    assert int((~keep).sum()) == count
    if isinstance(pattern, NM):
        assert (keep.unflatten(1, (-1, pattern.m)).sum(-1) >= pattern.n).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4), NM(1, 8)])
def test_what_is_zero_stays_zero(pattern: Any) -> None:
    """Also where n:m has room for more; and in a layer that holds nothing."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(12, 32, generator=generator) * (torch.rand(12, 32, generator=generator) > 0.45)
    keep = choose(scores, pattern, int((scores == 0).sum()))
    assert torch.equal(keep, scores > 0)
    gradient = torch.ones_like(scores)
    assert not choose(torch.zeros_like(scores), pattern, scores.numel()).any()
    assert not choose(torch.zeros_like(scores), pattern, scores.numel(), gradient, 0.5).any()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_what_grows_is_where_the_gradient_is_largest(pattern: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, gradient = torch.rand(2, 8, 32, generator=generator)
    zero = ~choose(torch.rand(8, 32, generator=generator), pattern, 128)
    scores[zero] = 0
    keep = choose(scores, pattern, 128, gradient, 0.25)
    assert int(keep.sum()) == 128
    if isinstance(pattern, NM):
        assert (keep.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    else:
        fallen = keep.logical_not() & ~zero
        assert int(fallen.sum()) == 32
        assert scores[fallen].max() < scores[keep & ~zero].min()
        assert gradient[keep & zero].min() > gradient[~keep & zero].max()
    assert int((keep & zero).sum()) == int((~keep & ~zero).sum())
    assert (keep & zero).any()


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "qwen3_moe"])
def test_layers_share_the_zeros_by_what_removal_costs(name: str) -> None:
    """Against one ranking of all weights by w^2 E[g^2]; in a layer the smallest fall."""
    model = decoders.build(name) if name == "qwen3_moe" else build(name)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    pruning = AdaptivePruning("30%", start=1, end=3, every=5)
    pruning.attach(model, optimizer, total_steps=3)
    train(model, optimizer, pruning, 2)
    ids = tokens(seed=2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    before = {matrix: weight.abs() for matrix, weight in matrices(model).items()}
    costs = {
        place.name: place.matrix.of(
            place.parameter.detach().square() * optimizer.state[place.parameter]["exp_avg_sq"]
        )
        for places in places_of(model).values()
        for place in places
    }
    pruning.step()
    threshold = torch.cat([cost.flatten() for cost in costs.values()]).quantile(0.3)
    shares = shares_of(model)
    for matrix, cost in costs.items():
        expected = min(float((cost < threshold).double().mean()), 0.93)
        assert shares[matrix] == pytest.approx(expected, abs=0.03)
        fallen = matrices(model)[matrix] == 0
        assert before[matrix][fallen].max() <= before[matrix][~fallen].min()
    assert max(shares.values()) - min(shares.values()) > 0.02
    assert zeros(model) == round(0.3 * size(model))


def test_a_layer_that_the_task_has_no_use_for_keeps_a_tenth_of_its_share() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-6)
    optimizer = AdamW(model.parameters(), lr=1e-9)
    pruning = AdaptivePruning("70%", start=0, end=2)
    pruning.attach(model, optimizer, total_steps=2)
    train(model, optimizer, pruning, 2)
    assert shares_of(model)["model.layers.1.mlp.down_proj"] == pytest.approx(0.97, abs=1e-3)


@pytest.mark.parametrize("grow", [0.0, 0.3])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_every_group_ends_with_n_of_m(pattern: str, grow: float) -> None:
    model = build("llama")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    pruning = AdaptivePruning(pattern, start=0, end=6, every=1, grow=grow)
    pruning.attach(model, optimizer, total_steps=8)
    train(model, optimizer, pruning, 8)
    n, m = map(int, pattern.split(":"))
    for name, weight in matrices(model).items():
        held = pruning.masks.held(f"{name}.weight")
        assert ((~held).unflatten(1, (-1, m)).sum(-1) == n).all()
        assert not weight[held].any()
        assert not torch.signbit(weight[held]).any()


def test_weights_come_back_from_zero_and_the_optimizer_forgets_what_fell() -> None:
    model = build("llama")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    pruning = AdaptivePruning("50%", start=0, end=4, every=2, grow=0.2, across_layers=False)
    pruning.attach(model, optimizer, total_steps=6)
    train(model, optimizer, pruning, 2)
    was = {name: weight == 0 for name, weight in matrices(model).items()}
    train(model, optimizer, pruning, 2)
    for places in places_of(model).values():
        [place] = places
        state, held = optimizer.state[place.parameter], pruning.masks.held(f"{place.name}.weight")
        grown = was[place.name] & ~held
        left = held.numel() - round(0.5 * held.numel())
        assert int(grown.sum()) == round(0.2 * left)
        assert not place.parameter[grown | held].any()
        assert not state["exp_avg"][grown | held].any()
        assert not state["exp_avg_sq"][held].any()
        others = state["exp_avg_sq"][~held & ~grown]
        torch.testing.assert_close(state["exp_avg_sq"][grown].mean(), others.mean(), rtol=1e-4, atol=0)
    train(model, optimizer, pruning, 1)
    for places in places_of(model).values():
        held = pruning.masks.held(f"{places[0].name}.weight")
        assert torch.equal(places[0].parameter == 0, held)


def test_without_adams_moments_each_matrix_has_as_many_zeros() -> None:
    model = build("llama")
    optimizer = SGD(model.parameters(), lr=1e-9)
    before = {name: weight.abs().clone() for name, weight in matrices(model).items()}
    pruning = AdaptivePruning("50%", start=0, end=2)
    pruning.attach(model, optimizer, total_steps=2)
    with pytest.warns(UserWarning, match="SGD has no second moments"):
        train(model, optimizer, pruning, 2)
    for name, weight in matrices(model).items():
        assert int((weight == 0).sum()) == round(0.5 * weight.numel())
        assert before[name][weight == 0].max() < before[name][weight != 0].min() + 1e-6


def test_what_no_step_has_seen_yet_is_worth_as_much_as_what_they_saw() -> None:
    """Sparse steps leave second moments of 0 where they left a channel out: no sign that it can fall."""
    shares = []
    for unseen in (True, False):
        model = build("llama")
        optimizer = AdamW(model.parameters(), lr=1e-3)
        pruning = AdaptivePruning("30%", start=1, end=3, every=5)
        pruning.attach(model, optimizer, total_steps=3)
        train(model, optimizer, pruning, 2)
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
            moments = optimizer.state[model.get_parameter(name)]["exp_avg_sq"]
            half = len(moments) // 2
            moments[:half] = 0 if unseen else moments[half:].mean()
        pruning.step()
        shares.append(shares_of(model))
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert min(shares[0].values()) > 0


@pytest.mark.parametrize("grow", [0.0, 0.1])
def test_beside_sparse_training(grow: float) -> None:
    model = build("llama")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    sat, pruning = SparseTraining(0.5, probe_every=2), AdaptivePruning("70%", **QUICK, grow=grow)
    sat.attach(model, optimizer, total_steps=STEPS)
    pruning.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, pruning, STEPS, sat)
    pruning.detach()
    sat.detach()
    assert zeros(model) == round(0.7 * size(model))
    for places in places_of(model).values():
        assert optimizer.state[places[0].parameter]["exp_avg_sq"].shape == places[0].parameter.shape


def test_one_callback_is_all_that_a_user_adds(tmp_path: Path) -> None:
    model = build("llama")
    run = trainer(model, tmp_path, AdaptivePruning("70%", **QUICK))
    run.train()
    logged = [entry["sparsity"] for entry in run.state.log_history if "loss" in entry]
    expected = [0.7 * (1 - (1 - share) ** 3) for share in (0, 0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1)]
    assert logged == pytest.approx(expected, abs=1e-3)
    assert zeros(model) == round(0.7 * size(model))
    losses = losses_of(run)
    assert losses[STEPS] < losses[1]


@pytest.mark.parametrize(("kind", "stop"), [("plain", 3), ("lora", 6), ("all", 6)])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path: Path, kind: str, stop: int) -> None:
    def run(folder: Path) -> Trainer:
        torch.manual_seed(0)
        model: Any = build("llama")
        callbacks: list[TrainerCallback] = [
            AdaptivePruning("70%", **QUICK, grow=0.1 if kind == "all" else 0.0)
        ]
        if kind == "lora":
            model = lora(model)
        if kind == "all":
            callbacks.append(SparsityAcceleratedTraining(0.5, probe_every=3))
        return trainer(model, folder, *callbacks, save_strategy="steps", save_steps=stop)

    uninterrupted = run(tmp_path / "a")
    uninterrupted.train()

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop + 1

    first = run(tmp_path / "b")
    first.add_callback(Interrupt())
    first.train()
    second = run(tmp_path / "b")
    second.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{stop}"))
    assert losses_of(second) == losses_of(uninterrupted)
    for here, there in zip(uninterrupted.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(here, there)


def test_merged_adapters_have_exactly_the_zeros_of_the_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = build("llama")
    total = size(plain)
    model = lora(plain)
    pruning = AdaptivePruning("70%", **QUICK)
    trainer(model, tmp_path, pruning).train()
    held = {name: pruning.masks.held(name) for name in pruning.masks.state_dict()}
    merged = pruning.masks.merge_lora(model)
    assert zeros(merged) == pytest.approx(0.7 * total, abs=len(held))
    for name, mask in held.items():
        weight = merged.get_parameter(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        assert torch.equal(weight == 0, mask)


def test_adapters_count_towards_what_a_weight_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora(build("llama"))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    whole = (layer.base_layer.weight + layer.get_delta_weight("default")).abs()
    pruning = AdaptivePruning("50%", start=0, end=1)
    pruning.attach(model, optimizer, total_steps=1)
    with warnings.catch_warnings(action="error"):
        train(model, optimizer, pruning, 1)
    fallen = layer.base_layer.weight == 0
    assert whole[fallen].max() <= whole[~fallen].min()


def test_sft_trainer(tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    model = build("llama")
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(BATCH).repeat(STEPS, 1)]
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        num_train_epochs=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    trl.SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[AdaptivePruning("2:4", **QUICK)],
    ).train()
    for weight in matrices(model).values():
        assert ((weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "7 in 10"}, "'7 in 10' is not a pattern"),
        ({"start": 0.6, "end": 0.5}, "must end after it starts, not start at 0.6 and end at 0.5"),
        ({"start": 20, "end": 20}, "must end after it starts"),
        ({"schedule": "square"}, "unknown schedule 'square': choose from cubic, linear"),
        ({"every": 0}, "every is a number of steps"),
        ({"grow": 1.0}, r"grow is a share .* not 1"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptivePruning(**{"pattern": "70%", **settings})


def test_what_does_not_suit_a_model_or_its_training(tmp_path: Path) -> None:
    model = build("llama")
    optimizer = AdamW(model.parameters())
    with pytest.raises(ValueError, match="pruning ends at step 11, training makes 10"):
        AdaptivePruning("70%", end=11).attach(model, optimizer, total_steps=10)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has 48 inputs, .* multiple of 5"):
        AdaptivePruning("2:5").attach(model, optimizer, total_steps=10)
    adapted = lora(build("llama"))
    with pytest.raises(ValueError, match="grow needs the gradients of all weights"):
        AdaptivePruning("70%", grow=0.1).attach(adapted, optimizer, total_steps=10)
    with torch.no_grad():
        for weight in matrices(model).values():
            weight[: len(weight) * 3 // 4] = 0
    with pytest.raises(ValueError, match=r"the model has 75\.0% zeros already, more than 70% asks for"):
        AdaptivePruning("70%").attach(model, optimizer, total_steps=10)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match="load_best_model_at_end may bring back"):
        trainer(build("llama"), tmp_path, AdaptivePruning("70%"), **best).train()
