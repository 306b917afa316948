"""The divergence and its gradient against the formula in float64, taken by autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from secateurs.recovery import loss as module
from secateurs.recovery.loss import divergence, states_error


def naive(logits: Tensor, wanted: Tensor, ids: Tensor, text: float) -> Tensor:
    """Position by position."""
    size = min(logits.shape[-1], wanted.shape[-1])
    total = torch.zeros((), dtype=torch.float64)
    for row, row_wanted, tokens in zip(logits, wanted, ids, strict=True):
        for i in range(len(tokens)):
            given = row[i, :size].double()
            target = row_wanted[i, :size].double().softmax(dim=-1)
            kl = functional.kl_div(given.log_softmax(dim=-1), target, reduction="sum")
            if i + 1 < len(tokens):
                total = total + (1 - text) * kl + text * functional.cross_entropy(given, tokens[i + 1])
            else:
                total = total + kl
    return total / ids.numel()


@given(
    text=st.sampled_from([0.0, 0.3, 1.0]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(2, 9)),
    extra=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    chunk=st.integers(1, 8),
    seed=st.integers(0, 100),
)
def test_value_and_gradient(
    text: float, shape: tuple[int, int, int], extra: tuple[int, int], chunk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, length, size = shape
    hidden = 3 * torch.randn(batch, length, size + extra[0], generator=generator)
    wanted = 3 * torch.randn(batch, length, size + extra[1], generator=generator)
    ids = torch.randint(size, (batch, length), generator=generator)
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        # Cubed and not by itself: the model's own graph is gone through as well.
        value = divergence(ours * 1.5, wanted.clone(), ids, text=text)
    (value**3).backward()
    expected = naive(plain * 1.5, wanted, ids, text)
    (expected**3).backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert ours.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_alike_is_zero_even_where_tokens_are_ruled_out() -> None:
    logits = torch.randn(2, 4, 6)
    logits[..., 2] = -torch.inf
    given = logits.clone().requires_grad_()
    value = divergence(given * 1, logits, torch.ones(2, 4, dtype=torch.int64))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert given.grad is not None
    assert given.grad.abs().max() < 1e-7


def test_without_a_gradient_the_logits_stay() -> None:
    logits, wanted = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    before = logits.clone()
    divergence(logits, wanted, torch.ones(1, 4, dtype=torch.int64))
    assert torch.equal(logits, before)


def test_a_model_that_needs_its_logits_again_is_not_given_wrong_gradients() -> None:
    """`exp` keeps its result for the backward pass."""
    hidden = torch.randn(1, 4, 6, requires_grad=True)
    value = divergence(hidden.exp(), torch.randn(1, 4, 6), torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@given(
    blocks=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_error_of_states_and_its_gradient(blocks: int, dtype: torch.dtype, seed: int) -> None:
    """Positions of very different sizes count alike, and one where nothing is wanted does not."""
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, 2, 5, 7)
    wanted = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, 5)[:, None]
    given = (wanted * (1 + torch.randn(shape, generator=generator))).to(dtype)
    wanted = wanted.to(dtype)
    wanted[:, 0, 0] = 0
    ours, plain = (given.clone().requires_grad_() for _ in range(2))
    value = states_error(ours, wanted)
    (3 * value).backward()
    difference, size = plain.double() - wanted.double(), wanted.double().square().sum(dim=-1)
    counts = size > 0
    expected = (difference.square().sum(dim=-1)[counts] / size[counts]).sum() / size.numel()
    (3 * expected).backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert ours.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=0)
