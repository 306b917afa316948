"""Importance against its definition, computed one unit at a time on the plain model."""

from typing import Any

import pytest
import torch
from test_omission import loss_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import build, tokens
from secateurs.training import importance
from secateurs.training.importance import METRICS, measure
from secateurs.training.omission import Omission
from secateurs.training.units import KINDS, Kind


def call(model: PreTrainedModel, metric: Any, **batch: Any) -> list[dict[Kind, Tensor]]:
    return measure(model, Omission(model, in_place=True), metric, (), {"input_ids": tokens(), **batch})


def reader_inputs(model: PreTrainedModel, kind: Kind, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of the second block: input of o or down by unit (batch, tokens, units, width), gradient, weight."""
    block = model.model.layers[1]
    layer = block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj
    found: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        found.append(args[0])

    hook = layer.register_forward_pre_hook(keep)
    loss(model).backward()
    hook.remove()
    width = 8 if kind == "attention" else 1  # of a head
    [states] = found
    weight = layer.weight.detach()
    return tuple(t.detach().unflatten(-1, (-1, width)) for t in (states, states.grad, weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["activation", "weighted", "taylor", "fisher"])
def test_forward_scores_are_what_they_say(metric: str, kind: Kind) -> None:
    model = build("llama", torch.float64)
    states, gradient, weight = reader_inputs(model, kind, loss_of)
    if metric == "activation":
        expected = states.square().sum(-1).mean((0, 1)).sqrt()
    elif metric == "weighted":
        expected = (states * weight.norm(dim=0)).square().sum(-1).mean((0, 1)).sqrt()
    elif metric == "taylor":
        expected = (states * gradient).sum(-1).abs().mean((0, 1))
    else:
        expected = (states * gradient).sum(-1).square().mean((0, 1))
    found = call(model, metric)[1][kind].flatten().double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9 * float(expected.max()))


def test_magnitude_is_the_norm_of_all_of_a_units_weights() -> None:
    model = build("opt", torch.float64)
    layer = model.model.decoder.layers[0]
    scores = call(model, "magnitude")[0]
    layer.requires_grad_(False)
    up, down = layer.fc1.weight[5], layer.fc2.weight[:, 5]
    assert float(scores["mlp"][0, 5]) == pytest.approx(float(torch.cat([up, down]).norm()), rel=1e-5)
    rows = slice(2 * 8, 3 * 8)
    attention = layer.self_attn
    parts = [attention.q_proj.weight[rows], attention.k_proj.weight[rows], attention.v_proj.weight[rows]]
    head = torch.cat([*(part.flatten() for part in parts), attention.out_proj.weight[:, rows].flatten()])
    assert float(scores["attention"][0, 2]) == pytest.approx(float(head.norm()), rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_measuring_leaves_no_trace(metric: Any) -> None:
    model = build("gpt2")
    model.train()
    model.transformer.h[0].eval()  # somebody froze its dropout
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    scores = call(model, metric)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all((block[kind] >= 0).all() for block in scores for kind in KINDS)


@pytest.mark.parametrize("metric", ["activation", "weighted"])
def test_padding_does_not_count(metric: Any) -> None:
    model = build("llama")
    short = tokens(2, 10)
    padded = torch.cat([short, torch.zeros(2, 6, dtype=torch.long)], 1)
    mask = torch.ones_like(padded)
    mask[:, 10:] = 0
    expected = call(model, metric, input_ids=short)
    found = call(model, metric, input_ids=padded, attention_mask=mask)
    for one, other in zip(expected, found, strict=True):
        for kind in KINDS:
            torch.testing.assert_close(one[kind], other[kind], rtol=1e-4, atol=1e-6)


def test_of_a_long_sequence_the_first_tokens_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "PROBE_TOKENS", 10)
    model = build("llama")
    ids = tokens(2, 24)
    found = call(model, "weighted", input_ids=ids, attention_mask=torch.ones_like(ids))
    monkeypatch.setattr(importance, "PROBE_TOKENS", 100)
    expected = call(model, "weighted", input_ids=ids[:1, :10])
    for one, other in zip(expected, found, strict=True):
        for kind in KINDS:
            torch.testing.assert_close(one[kind], other[kind])
