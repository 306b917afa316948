"""The C++ products of bfloat16 matrices against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.pruning.solvers import products_cpu

pytestmark = pytest.mark.skipif(
    not products_cpu.serves(torch.empty(0), torch.empty(0, dtype=torch.bfloat16)),
    reason="this processor has no AVX-512 BF16, or there was no compiler to install with",
)


def random(*shape: int, seed: int) -> torch.Tensor:
    """bfloat16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(actual: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> bool:
    """To the rounding of a sum in float32, whose terms' absolute values add up to `size`."""
    return bool(((actual.double() - exact).abs() <= 2.0**-18 * size + 1e-30).all())


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 600),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([0.0, 0.75]),
    st.integers(0, 3),
)
def test_same_as_in_float64(tokens: int, outputs: int, inputs: int, beta: float, beside: int) -> None:
    # Rows further apart than they are wide, as those of a part of a larger matrix.
    targets = random(tokens, outputs + beside, seed=1)[:, beside:]
    given_, before = random(tokens, inputs + beside, seed=2)[:, :inputs], torch.randn(outputs, inputs)
    after = before.clone()
    products_cpu.accumulate(after, targets, given_, beta=beta, alpha=0.25)
    y, x = targets.double(), given_.double()
    size = beta * before.double().abs() + 0.25 * y.abs().T @ x.abs()
    assert close(after, beta * before.double() + 0.25 * y.T @ x, size)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_upper_triangle_of_a_symmetric_sum(tokens: int, width: int) -> None:
    inputs, moment = random(tokens, width, seed=3), torch.zeros(width, width)
    products_cpu.accumulate(moment, inputs, inputs, beta=0, alpha=1, upper=True)
    x = inputs.double()
    assert close(moment.triu(), (x.T @ x).triu(), x.abs().T @ x.abs())


def test_same_bits_for_any_number_of_threads() -> None:
    targets, inputs = random(700, 300, seed=1), random(700, 200, seed=2)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(torch.ones(300, 200))
            products_cpu.accumulate(results[-1], targets, inputs, beta=0.5, alpha=1 / 700)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_what_is_replaced_is_not_read() -> None:
    inputs, moment = random(40, 20, seed=1), torch.full((20, 20), float("nan"))
    products_cpu.accumulate(moment, inputs, inputs, beta=0, alpha=1)
    assert moment.isfinite().all()


def test_what_is_not_finite_shows() -> None:
    inputs, moment = random(40, 20, seed=1), torch.zeros(20, 20)
    inputs[7, 3] = float("inf")
    products_cpu.accumulate(moment, inputs, inputs, beta=1, alpha=1)
    assert not moment[3].isfinite().any()
    assert moment[:3, :3].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    moment, x = torch.zeros(4, 6), random(10, 6, seed=1)
    for wrong in (x, x[:9, :4], x[:, :4].float(), x[:, :4].half(), x[:, :4].to("meta"), x[:, 0]):
        with pytest.raises(AssertionError):
            products_cpu.accumulate(moment, wrong, x, beta=0, alpha=1)
    with pytest.raises(AssertionError):
        products_cpu.accumulate(moment, x[:0, :4], x[:0], beta=0, alpha=1)
    assert not products_cpu.serves(moment.double(), x)
    assert not products_cpu.serves(moment, x.half())
