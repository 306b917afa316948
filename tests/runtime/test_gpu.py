import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import DTYPES, pruned, sparse

from secateurs.runtime.format import mask_of, pack, row_offsets, values_of

pytest.importorskip("triton")
from secateurs.runtime import gpu, semi_structured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16, so one unit in the last place.
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 600),
    st.integers(1, 16),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_triton_products_and_expansion(
    rows: int,
    columns: int,
    tokens: int,
    sparsity: float,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    has_bias: bool,
) -> None:
    weight = sparse(rows, columns, sparsity, dtype)
    packed, layout = pack(weight)
    offsets = row_offsets("w", packed, layout).to(DEVICE)
    packed = packed.to(DEVICE)
    mask, values = mask_of(packed, layout), values_of(packed, layout)
    x = torch.randn(tokens, columns).to(x_dtype)
    bias = torch.randn(rows).to(x_dtype) if has_bias else None
    y = gpu.linear(x.to(DEVICE), mask, values, offsets, None if bias is None else bias.to(DEVICE)).cpu()
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    tolerance = ROUNDING[x_dtype] * exact.abs() + 2.0**-20 * size + 2.0**-24
    assert y.dtype == x_dtype
    assert ((y.double() - exact).abs() <= tolerance).all()
    first = rows // 2
    assert torch.equal(gpu.expand(mask, values, offsets, columns, first, rows).cpu(), weight[first:])


def test_two_of_four_is_recognised() -> None:
    weight = torch.ones(4, 64).view(4, 16, 4)
    weight[:, :, [1, 3]] = 0
    mask = mask_of(*pack(weight.view(4, 64)))
    assert semi_structured.is_two_of_four(mask)
    weight[2, 7, 1] = 1
    assert not semi_structured.is_two_of_four(mask_of(*pack(weight.view(4, 64))))


def test_without_tensor_cores_2_4_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"no 2:4 tensor cores on cpu"):
        semi_structured.to_semi_structured(pruned("llama"))
