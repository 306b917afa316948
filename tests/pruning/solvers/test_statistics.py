"""Statistics against what numpy says of all inputs at once."""

import numpy as np
import pytest
import torch
from problems import correlated_inputs, weight_of

from secateurs.pruning.solvers import products_cpu
from secateurs.pruning.solvers.statistics import CHUNK, Products, Statistics


def test_moment_of_a_stream():
    inputs = correlated_inputs(300, 12)
    statistics = Statistics(12, dtype=torch.float64)
    for piece in inputs.split([1, 99, 200]):
        statistics.update(piece.unflatten(0, (1, -1)))
    x = inputs.numpy()
    assert statistics.tokens == 300
    np.testing.assert_allclose(statistics.moment, x.T @ x / 300, rtol=1e-12)
    np.testing.assert_allclose(statistics.norms, np.sqrt((x**2).mean(axis=0)), rtol=1e-12)


def test_shrunk_towards_the_diagonal_of_all_inputs_so_far():
    inputs = correlated_inputs(300, 12)
    statistics = Statistics.from_inputs(inputs[:100])
    for seen in (100, 300):
        exact = inputs[:seen].numpy().T @ inputs[:seen].numpy() / seen
        for share in (0.0, 0.3, 1.0):
            expected = (1 - share) * exact + share * np.diag(np.diag(exact))
            shrunk = statistics.shrunk(share)
            np.testing.assert_allclose(shrunk.moment, expected, rtol=1e-12)
            np.testing.assert_allclose(shrunk.norms, statistics.norms, rtol=0)
            assert shrunk.tokens == seen
        statistics.update(inputs[100:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_inputs_are_accumulated_in_single_precision(dtype):
    inputs = torch.randn(CHUNK + 100, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    statistics = Statistics.from_inputs(inputs)
    exact = inputs.double().numpy()
    assert statistics.moment.dtype == torch.float32
    np.testing.assert_allclose(statistics.moment, exact.T @ exact / len(exact), rtol=1e-5, atol=1e-6)


def test_error_is_the_lost_share_of_the_output():
    inputs, dense = correlated_inputs(50, 12), weight_of(5, 12)
    sparse = dense * (weight_of(5, 12, seed=2) > 0)
    x, w, s = inputs.numpy(), dense.numpy(), sparse.numpy()
    expected = ((x @ (w - s).T) ** 2).sum() / ((x @ w.T) ** 2).sum()
    assert Statistics.from_inputs(inputs).error(dense, sparse) == pytest.approx(expected, rel=1e-10)
    assert Statistics.from_inputs(inputs).error(dense, dense) == 0
    assert Statistics.from_inputs(torch.zeros(4, 12)).error(dense, sparse) == 0


@pytest.fixture(params=["kernel", "torch"])
def products_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products of bfloat16 matrices by the kernel, where this machine has it, and without it."""
    if request.param == "torch":
        monkeypatch.setattr(products_cpu, "serves", lambda moment, inputs: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 257, 700])
@pytest.mark.usefixtures("products_by")
def test_moment_of_wide_inputs(width: int, dtype: torch.dtype):
    """Only one side of the diagonal is computed: the other must be its mirror image, also after reading."""
    first, second = (correlated_inputs(40 + seed, width, seed=seed).to(dtype) for seed in (0, 1))
    statistics = Statistics(width, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    seen = first.double()
    for piece in (first, second):
        statistics.update(piece)
        seen = piece.double() if piece is first else torch.cat([seen, piece.double()])
        exact, size = seen.T @ seen / len(seen), seen.abs().T @ seen.abs() / len(seen)
        rounding = len(seen) * torch.finfo(statistics.mean.dtype).eps * size  # of any order of summation
        assert ((statistics.moment - exact).abs() <= rounding).all()
        assert torch.equal(statistics.moment, statistics.moment.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("products_by")
def test_products_of_half_precision_inputs(dtype: torch.dtype):
    """Where targets are rounded to the inputs' dtype to be multiplied, it is by that and no more."""
    inputs, targets = correlated_inputs(300, 20).to(dtype), weight_of(300, 7).float()
    products = Products(7, 20)
    for x, y in zip(inputs.split(130), targets.split(130), strict=True):
        products.update(y, x)
    y, x = targets.double(), inputs.double()
    rounding = torch.finfo(dtype).eps / 2 * y.abs().T @ x.abs() / 300 + 1e-6
    assert ((products.moment - y.T @ x / 300).abs() <= rounding).all()
    torch.testing.assert_close(products.mean.double(), y.mean(dim=0), rtol=1e-2, atol=1e-3)
    assert products.moment.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_change_nothing(dtype: torch.dtype):
    inputs, none = correlated_inputs(30, 20).to(dtype), torch.empty(0, 20, dtype=dtype)
    statistics, products = Statistics(20), Products(20, 20)
    for piece in (none, inputs, none):
        statistics.update(piece)
        products.update(piece, piece)
    statistics.update(torch.empty(1, 0, 20, dtype=dtype))
    assert statistics.tokens == products.tokens == 30
    torch.testing.assert_close(statistics.moment, Statistics.from_inputs(inputs).moment, rtol=0, atol=0)
    torch.testing.assert_close(products.moment, statistics.moment, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_inputs_with_themselves(dtype: torch.dtype):
    """They are a whole matrix, on both sides of the diagonal."""
    inputs = correlated_inputs(64, 300).to(dtype)
    products = Products(300, 300)
    products.update(inputs, inputs)
    x = inputs.double()
    torch.testing.assert_close(products.moment.double(), x.T @ x / 64, rtol=1e-4, atol=1e-4)


def test_factor_rebuilds_the_damped_moment():
    inputs = correlated_inputs(60, 20)
    inputs[:, 7] = 0
    statistics = Statistics.from_inputs(inputs)
    moment = statistics.moment.numpy()
    expected = moment + 0.01 * np.trace(moment) / 20 * np.eye(20)
    expected[7, 7] += 1
    root = statistics.factor(0.01).numpy()
    np.testing.assert_allclose(root @ root.T, expected, atol=1e-10 * np.abs(expected).max())
    assert (root == np.triu(root)).all()


def test_ridge_inverse_inverts_the_correlations():
    inputs = correlated_inputs(60, 20)
    inputs[:, 7] = 0
    statistics = Statistics.from_inputs(inputs)
    moment = statistics.moment.numpy()
    norms = np.sqrt(np.diag(moment))
    norms[7] = 1
    correlations = moment / norms / norms[:, None]
    np.testing.assert_allclose(
        statistics.ridge_inverse(0.5), np.linalg.inv(correlations + 0.5 * np.eye(20)), atol=1e-12
    )


def test_factors_are_shared_until_more_tokens_come():
    statistics = Statistics.from_inputs(correlated_inputs(60, 20))
    factor, inverse = statistics.factor(0.01), statistics.ridge_inverse(1.0)
    assert statistics.factor(0.01) is factor
    assert statistics.ridge_inverse(1.0) is inverse
    assert statistics.factor(0.1) is not factor
    statistics.update(correlated_inputs(30, 20, seed=5))
    fresh = Statistics(20, dtype=torch.float64)
    fresh.update(torch.cat([correlated_inputs(60, 20), correlated_inputs(30, 20, seed=5)]))
    np.testing.assert_allclose(statistics.factor(0.01), fresh.factor(0.01), atol=1e-9)
    np.testing.assert_allclose(statistics.ridge_inverse(1.0), fresh.ridge_inverse(1.0), atol=1e-9)


def test_more_damping_where_the_factorisation_fails():
    statistics = Statistics(3, dtype=torch.float64)
    # Eigenvalues 2.1, 1 and -0.1: positive definite only from a tenth of the mean of the diagonal on.
    statistics._moment = torch.tensor(
        [[1.0, 1.1, 0.0], [1.1, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    root = statistics.factor(0.02)
    expected = statistics.moment + 0.2 * torch.eye(3)
    np.testing.assert_allclose(root @ root.T, expected, atol=1e-12)


def test_no_damping_is_enough():
    statistics = Statistics(2)
    statistics._moment = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    with pytest.raises(FloatingPointError, match="not positive definite"):
        statistics.factor(0.01)
    with pytest.raises(FloatingPointError, match="not positive definite"):
        statistics.ridge_inverse(0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(bad):
    inputs = correlated_inputs(60, 20)
    inputs[3, 4] = bad
    statistics = Statistics.from_inputs(inputs)
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        statistics.factor(0.01)
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        statistics.ridge_inverse(1.0)
