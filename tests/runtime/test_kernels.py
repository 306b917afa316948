import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import DTYPES, sparse

from secateurs import native
from secateurs.runtime import kernels
from secateurs.runtime.cpu import ISAS, CpuKernels, cpu_kernels
from secateurs.runtime.format import pack, row_offsets
from secateurs.runtime.kernels import expand, sparse_linear
from secateurs.runtime.layout import Codes
from secateurs.values import Values

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_is_product(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Compares with the float64 product: the output's rounding, plus float32 sums over the columns."""
    x, weight = x.double(), weight.double()
    exact, size = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    tolerance = ROUNDING[y.dtype] * exact.abs() + 2.0**-22 * weight.shape[1] ** 0.5 * size + 1e-30
    if y.dtype == torch.float16:
        tolerance += 2.0**-24  # its subnormals
    assert ((y.double() - exact).abs() <= tolerance).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 70),
    st.integers(1, 600),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 1000),
)
def test_products_of_any_shape(
    path: str,
    rows: int,
    columns: int,
    tokens: int,
    sparsity: float,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    has_bias: bool,
    seed: int,
) -> None:
    weight = sparse(rows, columns, sparsity, dtype, seed)
    if rows > 2:
        weight[1] = 0
        weight[:, 0] = -0.0
    packed, layout = pack(weight)
    offsets = row_offsets("w", packed, layout)
    x = torch.randn(tokens, columns).to(x_dtype)
    bias = torch.randn(rows).to(x_dtype) if has_bias else None
    assert_is_product(sparse_linear(x, packed, offsets, bias, layout), x, weight, bias)
    first = rows // 2
    assert torch.equal(expand(packed, offsets, layout, first, rows), weight[first:])


@pytest.mark.parametrize("tokens", [1, 3, 12, 13, 64, 259])
def test_two_threads_and_several_panels(path: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PANEL_BYTES", 100_000)
    threads = torch.get_num_threads()
    weight = sparse(500, 700, 0.6, torch.bfloat16)
    weight[:200] = 0  # the threads' shares are of bytes, not of rows
    packed, layout = pack(weight)
    x = torch.randn(tokens, 700).to(torch.bfloat16)
    try:
        torch.set_num_threads(2)
        y = sparse_linear(x, packed, row_offsets("w", packed, layout), None, layout)
    finally:
        torch.set_num_threads(threads)
    assert_is_product(y, x, weight)


@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (0, 70), (2, 0, 70)])
def test_tokens_may_have_any_batch_shape(path: str, shape: tuple[int, ...]) -> None:
    weight = sparse(5, 70, 0.5, torch.float32)
    packed, layout = pack(weight)
    x = torch.randn(shape)
    y = sparse_linear(x, packed, row_offsets("w", packed, layout), None, layout)
    assert y.shape == (*shape[:-1], 5)
    assert torch.allclose(y, x @ weight.T, atol=1e-5)


def test_tokens_need_not_be_contiguous(path: str) -> None:
    weight = sparse(5, 70, 0.5, torch.float32)
    packed, layout = pack(weight)
    x = torch.randn(70, 4).T
    assert_is_product(sparse_linear(x, packed, row_offsets("w", packed, layout), None, layout), x, weight)


@pytest.mark.parametrize("tokens", [2, 60])
def test_gradients_reach_the_input_and_the_bias(path: str, tokens: int) -> None:
    weight = sparse(9, 70, 0.5, torch.float32)
    packed, layout = pack(weight)
    offsets = row_offsets("w", packed, layout)
    x, bias = torch.randn(tokens, 70, requires_grad=True), torch.randn(9, requires_grad=True)
    twin_x, twin_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    sparse_linear(x, packed, offsets, bias, layout).square().sum().backward()
    torch.nn.functional.linear(twin_x, weight, twin_bias).square().sum().backward()
    assert torch.allclose(x.grad, twin_x.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(bias.grad, twin_bias.grad, rtol=1e-4, atol=1e-4)


def test_one_token_without_a_batch_has_gradients_too() -> None:
    weight = sparse(9, 70, 0.5, torch.float32)
    packed, layout = pack(weight)
    x, bias = torch.randn(70, requires_grad=True), torch.randn(9, requires_grad=True)
    sparse_linear(x, packed, row_offsets("w", packed, layout), bias, layout).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0), atol=1e-5)
    assert torch.equal(bias.grad, torch.ones(9))


def test_the_operators_keep_torchs_rules() -> None:
    packed, layout = pack(sparse(9, 70, 0.5, torch.bfloat16))
    offsets = row_offsets("w", packed, layout)
    x = torch.randn(2, 3, 70, requires_grad=True)
    rest = (layout.columns, layout.dtype)
    torch.library.opcheck(torch.ops.secateurs.linear, (x, packed, offsets, torch.randn(9), *rest))
    torch.library.opcheck(torch.ops.secateurs.input_gradient, (torch.randn(2, 3, 9), packed, offsets, *rest))


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    loaded = native.library("runtime._kernels", "")
    if loaded is None:
        pytest.skip("installed without a compiler")
    with pytest.raises(ValueError, match="no instruction set 'sve' here"):
        CpuKernels(loaded, "sve")


def test_without_a_library_torch_multiplies_and_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    monkeypatch.delenv("SECATEURS_ISA", raising=False)
    weight = sparse(5, 70, 0.5, torch.float32)
    packed, layout = pack(weight)
    offsets, x = row_offsets("w", packed, layout), torch.randn(2, 70)
    native.library.cache_clear()
    cpu_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="slower than dense ones .*no C\\+\\+ compiler"):
            sparse_linear(x, packed, offsets, None, layout)
        with warnings.catch_warnings(action="error"):
            assert_is_product(sparse_linear(x, packed, offsets, None, layout), x, weight)
    finally:
        native.library.cache_clear()
        cpu_kernels.cache_clear()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="nobody else says what the processor has")
def test_where_any_number_of_tokens_is_multiplied_at_once() -> None:
    told = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(told[1].split()) if told else set()
    own = kernels.cpu_kernels()
    if own is None or own.isa < ISAS.index("avx512"):
        pytest.skip("no AVX-512")
    _, stored = pack(sparse(8, 64, 0.5, torch.bfloat16))
    coded = replace(stored, codes=Codes(Values(4), masked=True, bytes=0))
    tiles = "amx_bf16" in flags
    for x_dtype in DTYPES:
        assert own.takes_many(x_dtype, coded) == ("avx512_vnni" in flags and not tiles)
        pairs = "avx512_bf16" in flags and x_dtype == torch.bfloat16
        assert own.takes_many(x_dtype, stored) == (pairs and not tiles)
        assert not own.takes_many(x_dtype, replace(stored, dtype=torch.float32))
