"""A whole run: its sets, its schedule, its parity with plain training, and what may go wrong."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from families import build, tokens
from secateurs.training import sparse
from secateurs.training.ladder import Constant, Ladder
from secateurs.training.sparse import SparseTraining

STEPS = 12


def run(
    model: PreTrainedModel,
    sat: SparseTraining | None,
    steps: int = STEPS,
    start: int = 0,
    optimizer: AdamW | None = None,
    forward: Callable[..., Any] | None = None,
    watch: Callable[[], None] = lambda: None,
    accumulate: int = 1,
) -> list[float]:
    """Losses of steps `start` to `steps`; attaches, and leaves the run attached."""
    optimizer = optimizer or AdamW(model.parameters(), lr=1e-2)
    model.train()
    if sat is not None and not sat.attached:
        sat.attach(model, optimizer, total_steps=STEPS)
    losses = []
    for step in range(start, steps):
        total = 0.0
        for ids in tokens(4, seed=step).chunk(accumulate):
            loss = (model if forward is None else forward)(input_ids=ids, labels=ids).loss / accumulate
            watch()
            loss.backward()
            total += loss.item()
        optimizer.step()
        if sat is not None:
            sat.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_rate_0_is_plain_training_bit_by_bit(name: str) -> None:
    plain, model = build(name), build(name)
    torch.manual_seed(0)
    expected = run(plain, None)
    torch.manual_seed(0)
    sat = SparseTraining(0.0)
    assert run(model, sat) == expected
    sat.detach()
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert sat.flops_done == sat.flops_dense > 0


@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("importance", ["activation", "weighted", "taylor", "fisher", "magnitude", "uniform"])
def test_the_set_has_the_ladders_size_and_changes_within_a_rung(importance: Any, select: Any) -> None:
    model = build("llama")
    ladder = Ladder(0.5, STEPS)
    sat = SparseTraining(schedule=ladder, importance=importance, select=select, probe_every=2, exempt=[-1])
    sizes: list[tuple[int, int]] = []
    sets = set()

    def watch() -> None:
        assert sat.kept[2] == {"attention": None, "mlp": None}
        heads, channels = sat.kept[0]["attention"], sat.kept[0]["mlp"]
        sizes.append(
            (18 if heads is None else int(heads.sum()), 80 if channels is None else int(channels.sum()))
        )
        sets.add(None if channels is None else tuple(channels.flatten().tolist()))
        layer = model.model.layers[0]
        assert layer.mlp.up_proj.weight.shape == (sizes[-1][1], 48)
        assert model.model.layers[2].mlp.up_proj.weight.shape == (80, 48)

    losses = run(model, sat, watch=watch)
    assert losses[-1] < losses[0]
    # The ladder of 12 steps: six at 0.5, then 0.4, 0.3, 0.2 and 0.1, of rounded lengths, and 0 in the end.
    expected = [sat.schedule.rate(step) for step in range(STEPS)]
    assert [channels for _, channels in sizes] == [80 - 8 * round(10 * rate) for rate in expected]
    assert expected[:6] == [0.5] * 6
    assert expected[-1] == 0
    assert sizes[-1] == (18, 80)
    if importance != "magnitude" or select == "sample":
        assert len(sets) > 6, "sets should change more often than sizes"
    sat.detach()
    assert model.model.layers[0].mlp.up_proj.weight.shape == (80, 48)


def test_evaluation_and_saving_see_the_whole_model_at_any_moment() -> None:
    model = build("llama", torch.float64)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    sat = SparseTraining(0.5, schedule="constant")
    run(model, sat, steps=3, optimizer=optimizer)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (40, 48)
    state = model.state_dict()
    assert state["model.layers.0.mlp.up_proj.weight"].shape == (80, 48)
    moments = optimizer.state_dict()["state"].values()
    assert {tuple(s["exp_avg"].shape) for s in moments} == {tuple(p.shape) for p in model.parameters()}
    run(model, sat, steps=4, start=3, optimizer=optimizer)
    model.eval()
    with torch.no_grad():
        logits = model(tokens()).logits
    plain = build("llama", torch.float64, seed=1)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(logits, plain(tokens()).logits)
    assert model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_accumulated_batches_see_one_set_and_equal_one_batch() -> None:
    whole, parts = build("llama", torch.float64), build("llama", torch.float64)
    settings: dict[str, Any] = {"importance": "magnitude", "probe_every": 2}  # not of the first micro-batch
    one = run(whole, SparseTraining(0.5, **settings))
    four = run(parts, SparseTraining(0.5, **settings), accumulate=4)
    assert four == pytest.approx(one, rel=1e-5)  # transformers takes the loss in float32


def test_gathering_trains_as_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [build("gemma2", torch.float64) for _ in range(2)]
    expected = run(models[0], SparseTraining(0.5, probe_every=3))
    attach = sparse.Omission
    monkeypatch.setattr(sparse, "Omission", lambda model, in_place: attach(model, in_place=False))
    sat = SparseTraining(0.5, probe_every=3)
    assert run(models[1], sat) == pytest.approx(expected, rel=1e-6)
    assert not sat.omission.in_place


@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(stop: int) -> None:
    settings: dict[str, Any] = {"rate": 0.5, "probe_every": 3, "select": "sample"}
    expected = run(build("llama"), SparseTraining(**settings))
    model = build("llama")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    sat = SparseTraining(**settings)
    assert run(model, sat, steps=stop, optimizer=optimizer) == expected[:stop]
    weights, moments, state = model.state_dict(), optimizer.state_dict(), sat.state_dict()

    model = build("llama", seed=1)
    model.load_state_dict(weights)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(moments)
    sat = SparseTraining(**settings)
    sat.attach(model, optimizer, total_steps=STEPS)
    sat.load_state_dict(state)
    assert run(model, sat, start=stop, optimizer=optimizer) == expected[stop:]


def test_under_autocast_it_trains_in_bfloat16() -> None:
    def train(sat: SparseTraining | None) -> list[float]:
        model = build("llama")

        def forward(**kwargs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return model(**kwargs)

        return run(model, sat, forward=forward)

    plain, sparse_losses = train(None), train(SparseTraining(0.5, probe_every=4))
    assert all(torch.tensor(sparse_losses).isfinite())
    assert sparse_losses[-1] == pytest.approx(plain[-1], rel=0.1)


def test_compiled_models_recompile_per_rung_and_not_per_set() -> None:
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["stats"]

    def one_block() -> PreTrainedModel:  # each block is compiled anew
        model = build("llama", torch.float64)
        model.model.layers = model.model.layers[:1]
        model.config = copy.copy(model.config)
        model.config.num_hidden_layers = 1
        return model

    model = one_block()
    compiled = torch.compile(model, backend="eager")
    settings: dict[str, Any] = {"select": "sample", "probe_every": 1, "schedule": Ladder(0.5, STEPS, rungs=2)}
    sat = SparseTraining(**settings)
    graphs: list[int] = []
    losses = run(model, sat, forward=compiled, watch=lambda: graphs.append(frames["unique_graphs"]))
    assert losses == pytest.approx(run(one_block(), SparseTraining(**settings)), rel=1e-6)
    assert graphs[0] == graphs[5] < graphs[6] == graphs[8] < graphs[9] == graphs[11]


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights() -> None:
    model = build("llama")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    sat = SparseTraining(0.5)
    run(model, sat, steps=2, optimizer=optimizer)
    before = weights_of(model)
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        run(model, sat, start=2, optimizer=optimizer, forward=poisoned(model))
    assert not sat.attached
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_from_outside_of_the_model_is_watched_too() -> None:
    model = build("llama").train()
    optimizer = AdamW(model.parameters())
    SparseTraining(0.5).attach(model, optimizer, total_steps=STEPS)
    (model(input_ids=tokens()).logits.mean() * float("inf")).backward()
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        optimizer.step()


def poisoned(model: PreTrainedModel) -> Callable[..., Any]:
    def forward(**kwargs: Any) -> Any:
        hook = model.lm_head.register_forward_hook(lambda m, a, out: out * float("nan"))
        try:
            return model(**kwargs)
        finally:
            hook.remove()

    return forward


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rate": 1.0}, r"rate is the share .* in \[0, 1\), not 1.0"),
        ({"rate": -0.1}, r"not -0.1"),
        ({"mlp_rate": 1.5}, r"mlp_rate is the share"),
        ({"rate": float("nan")}, "not nan"),
        ({"importance": "charm"}, "unknown importance 'charm': choose from activation"),
        ({"select": "best"}, "unknown selection 'best'"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine': choose from ladder"),
        ({"probe_every": 0}, "at least 1, not 0"),
        ({"rate": 0.3, "schedule": Constant(0.5, 10)}, "give one of them"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SparseTraining(**settings)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"attention_rate": 0.9}, r"rate 0.9 leaves a layer none of the 3 heads of each of its 2 key-value"),
        ({"schedule": Ladder(0.5, STEPS + 1)}, "spans 13 steps, training makes 12"),
        ({"exempt": [3]}, "cannot exempt block 3: the model has blocks 0 to 2"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_refused_before_training(
    settings: dict[str, Any], complaint: str
) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=complaint):
        SparseTraining(**settings).attach(model, AdamW(model.parameters()), total_steps=STEPS)


def test_attention_and_mlp_have_their_own_rates() -> None:
    model = build("opt")
    sat = SparseTraining(attention_rate=0.0, mlp_rate=0.75, schedule="constant")
    run(model, sat, steps=1)
    assert sat.kept[0]["attention"] is None
    assert int(sat.kept[0]["mlp"].sum()) == 24
    assert sat.rates == [{"attention": 0.0, "mlp": 0.75}] * 3


def test_flops_are_those_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = build("llama")
    model.set_attn_implementation("eager")
    sat = SparseTraining(0.5, schedule="constant", importance="magnitude")
    sat.attach(model, AdamW(model.parameters()), total_steps=2)
    model.train()
    for _ in range(2):  # the first chooses the set
        with FlopCounterMode(display=False) as counter:
            model(input_ids=tokens(), labels=tokens()).loss.backward()
    # Attention is counted as causal, and eager attention computes all pairs.
    assert counter.get_total_flops() == pytest.approx(sat.flops_done / 2, rel=0.05)
