"""Divergence against float64 arithmetic on transformers' own logits."""

import math

import pytest
import torch

from families import build, tokens
from secateurs import divergence


def expected(length: int, windows: int, bos: int | None) -> float:
    """By the definition of KL, in float64, position by position."""
    total = []
    for window in tokens(4, 24).flatten().split(length - (bos is not None))[:windows]:
        ids = window[None] if bos is None else torch.cat([torch.tensor([bos]), window])[None]
        with torch.no_grad():
            wanted, given = (build("llama", seed=s)(ids).logits[0, :-1].double().softmax(-1) for s in (0, 1))
        total.append(float((wanted * (wanted / given).log()).sum(-1).mean()))
    return sum(total) / len(total)


@pytest.mark.parametrize(("length", "windows", "bos"), [(24, 4, None), (10, 3, None), (16, 2, 1)])
def test_it_is_kl_from_the_dense_models_predictions(length: int, windows: int, bos: int | None) -> None:
    dense, pruned = build("llama", seed=0).eval(), build("llama", seed=1).eval()
    text = tokens(4, 24).flatten()
    found = divergence(dense, pruned, text, length=length, windows=windows, bos=bos)
    assert math.isclose(found, expected(length, windows, bos), rel_tol=1e-4)
    assert found > 0
    if bos is not None:  # the tokenizer's own, at the front of the text, is not counted twice
        marked = torch.cat([torch.tensor([bos]), text])
        assert divergence(dense, pruned, marked, length=length, windows=windows, bos=bos) == found
    assert divergence(dense, dense, text, length=length) == pytest.approx(0, abs=1e-6)


def test_dropout_is_off_and_modes_come_back() -> None:
    dense, pruned = build("llama", seed=0).eval(), build("llama", seed=1).eval()
    text = tokens(4, 24).flatten()
    expected = divergence(dense, pruned, text, length=12)
    for model in (dense, pruned):
        model.train()
        for block in model.model.layers:
            block.self_attn.attention_dropout = 0.5
    pruned.eval()
    assert divergence(dense, pruned, text, length=12) == expected
    assert dense.training
    assert not pruned.training


def test_mistakes_are_one_line() -> None:
    model = build("llama").eval()
    with pytest.raises(ValueError, match="one window needs 30"):
        divergence(model, model, tokens(1, 24).flatten(), length=30)
    with pytest.raises(ValueError, match="suit this model"):
        divergence(model, model, tokens(400, 24).flatten(), length=5000)
    with pytest.raises(ValueError, match="10000"):
        divergence(model, model, torch.full((30,), 10_000), length=10)
    with torch.no_grad():
        broken = build("llama").eval()
        broken.lm_head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="window 0"):
        divergence(model, broken, tokens(1, 24).flatten(), length=12)
