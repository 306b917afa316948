"""The table of highest rates: what measuring it promises, and a run that follows it."""

from typing import Any

import pytest
import torch
from test_sparse import STEPS, run
from torch.optim import AdamW

from families import build
from secateurs.training.importance import Scores
from secateurs.training.omission import Omission
from secateurs.training.rates import MOST, Rates, measured_rates
from secateurs.training.sparse import SparseTraining
from secateurs.training.units import KINDS

WEIGHTS = {"attention": 2 * 48 * 8, "mlp": 3 * 48}
"""Of a unit of the tiny llama: a head's rows of q and columns of o, a channel's of gate, up and down."""


def omission() -> Omission:
    return Omission(build("llama"), in_place=True)


def random_costs(cutting: Omission, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return [
        {k: torch.rand(u.groups, u.size, generator=generator) ** 3 for k, u in block.units.items()}
        for block in cutting.blocks
    ]


def spent(cutting: Omission, rates: Rates, costs: Scores) -> tuple[float, float]:
    """Multiplications left out for a token, and what that costs."""
    multiplications = cost = 0.0
    for block, of, prices in zip(cutting.blocks, rates, costs, strict=True):
        for kind, units in block.units.items():
            left_out = round(of[kind] * units.size)
            multiplications += left_out * units.groups * WEIGHTS[kind]
            cost += float(prices[kind].sort(1).values[:, :left_out].double().sum())
    return multiplications, cost


@pytest.mark.parametrize("budget", [0.1, 0.5, 0.8])
def test_no_other_table_omits_as_much_for_less(budget: float) -> None:
    cutting = omission()
    costs = random_costs(cutting)
    rates = measured_rates(cutting, costs, budget, ())
    omitted, cost = spent(cutting, rates, costs)
    total = 3 * (6 * WEIGHTS["attention"] + 80 * WEIGHTS["mlp"])
    step = max(2 * WEIGHTS["attention"], 8 * WEIGHTS["mlp"])  # a head in each of two groups, eight channels
    assert budget * total - step < omitted <= budget * total
    generator = torch.Generator().manual_seed(1)
    others = 0
    for _ in range(2000):
        heads, channels = (torch.randint(n, (3,), generator=generator) for n in (3, 10))
        other: Rates = [
            {"attention": float(h) / 3, "mlp": float(c) / 10} for h, c in zip(heads, channels, strict=True)
        ]
        as_much, price = spent(cutting, other, costs)
        if as_much >= omitted:
            others += 1
            assert price >= cost - 1e-9
    assert others > 20 or budget == 0.8


def test_blocks_may_be_exempt_and_none_is_emptied() -> None:
    cutting = omission()
    rates = measured_rates(cutting, random_costs(cutting), 0.99, [-1])
    assert rates[2] == {"attention": 0.0, "mlp": 0.0}
    assert all(0 < rates[block][kind] <= MOST for block in (0, 1) for kind in KINDS)


def test_a_run_measures_its_rates_and_ends_dense() -> None:
    model = build("llama")
    sat = SparseTraining("auto")
    channels: list[int] = []
    losses = run(
        model,
        sat,
        watch=lambda: channels.append(
            sum(int(block["mlp"].sum()) if block["mlp"] is not None else 80 for block in sat.kept)
        ),
    )
    assert losses[-1] < losses[0]
    assert sat.peaks is not None
    assert channels[0] == sum(80 - round(80 * of["mlp"]) for of in sat.peaks)
    assert channels[0] < channels[-1] == 3 * 80
    assert sat.flops_done < sat.flops_dense
    sat.detach()
    assert model.model.layers[0].mlp.up_proj.weight.shape == (80, 48)


def test_a_resumed_run_keeps_its_rates() -> None:
    expected = run(build("llama"), SparseTraining("auto", probe_every=3))
    model = build("llama")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    sat = SparseTraining("auto", probe_every=3)
    assert run(model, sat, steps=4, optimizer=optimizer) == expected[:4]
    weights, moments, state = model.state_dict(), optimizer.state_dict(), sat.state_dict()

    model = build("llama", seed=1)
    model.load_state_dict(weights)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(moments)
    resumed = SparseTraining("auto", probe_every=3)
    resumed.attach(model, optimizer, total_steps=STEPS)
    resumed.load_state_dict(state)
    assert resumed.peaks == sat.peaks
    assert run(model, resumed, start=4, optimizer=optimizer) == expected[4:]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rate": "auto", "mlp_rate": 0.5}, "leave out their own"),
        ({"rate": "most"}, "rate is a number or 'auto', not 'most'"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SparseTraining(**settings)
