from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import DTYPES, logits, pruned, save, sparse
from transformers import LlamaConfig, LlamaForCausalLM

from secateurs.runtime.convert import compress
from secateurs.runtime.format import mask_of, pack, row_offsets
from secateurs.values import Values

pytest.importorskip("triton")
from secateurs.runtime import gpu, semi_structured
from secateurs.runtime.linear import SparseLinear
from secateurs.runtime.load import load_model

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
    x = torch.randn(tokens, columns).to(x_dtype)
    bias = torch.randn(rows).to(x_dtype) if has_bias else None
    y = gpu.linear(x.to(DEVICE), packed, offsets, None if bias is None else bias.to(DEVICE), layout).cpu()
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    tolerance = ROUNDING[x_dtype] * exact.abs() + 2.0**-20 * size + 2.0**-24
    assert y.dtype == x_dtype
    assert ((y.double() - exact).abs() <= tolerance).all()
    first = rows // 2
    assert torch.equal(gpu.expand(packed, offsets, layout, first, rows).cpu(), weight[first:])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 11),
    st.integers(1, 1100),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_one_token_against_float64(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype, has_bias: bool
) -> None:
    """Rows that fill no program, columns that fill no block or word of the mask, and words whose highest bit
    is set."""
    weight = sparse(rows, columns, sparsity, dtype)
    packed, layout = pack(weight)
    offsets = row_offsets("w", packed, layout).to(DEVICE)
    x, bias = torch.randn(1, columns).to(dtype), torch.randn(rows).to(dtype) if has_bias else None
    there = None if bias is None else bias.to(DEVICE)
    y = gpu.linear(x.to(DEVICE), packed.to(DEVICE), offsets, there, layout).cpu()
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 2.0**-20 * size + 2.0**-24).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 600),
    st.integers(1, 16),
    st.sampled_from(["none", 0.0, 0.5, 0.9, 1.0]),
    st.sampled_from(
        [Values(8, 128), Values(4, 32), Values(4, 128, "half"), Values(3), Values(2, 32, "half")]
    ),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
)
def test_triton_products_with_codes(
    rows: int,
    columns: int,
    tokens: int,
    sparsity: float | str,
    values: Values,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
) -> None:
    codes = torch.randint(2**values.bits, (rows, columns)).to(torch.uint8)
    scales = torch.randn(rows, values.groups(columns)).bfloat16()
    kept = torch.rand(rows, columns) >= (0.0 if isinstance(sparsity, str) else sparsity)
    weight = (values.decode(codes, scales) * kept + 0.0).to(dtype)
    packed, layout = pack(weight, (values, scales), masked=sparsity != "none")
    assert layout.codes is not None
    offsets, packed = row_offsets("w", packed, layout).to(DEVICE), packed.to(DEVICE)
    found = gpu.expand(packed, offsets, layout, 0, rows).cpu()
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        assert ((found - weight).double().abs() <= ROUNDING[dtype] * weight.double().abs()).all()
    else:
        assert torch.equal(found, weight)
    first = rows // 2
    assert torch.equal(gpu.expand(packed, offsets, layout, first, rows).cpu(), found[first:])
    x = torch.randn(tokens, columns).to(x_dtype)
    y = gpu.linear(x.to(DEVICE), packed, offsets, None, layout).cpu()
    exact, size = x.double() @ found.double().T, x.double().abs() @ found.double().abs().T
    assert ((y.double() - exact).abs() <= ROUNDING[x_dtype] * exact.abs() + 2.0**-20 * size + 2.0**-24).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_compressed_model_on_a_gpu(family: str, tmp_path: Path) -> None:
    dense = pruned(family)
    compress(save(dense, tmp_path / "dense"), tmp_path / "compressed")
    model = load_model(tmp_path / "compressed", "cuda")
    ids = torch.arange(40).view(2, 20) * 7 % 320
    with torch.no_grad():
        for some in (ids, ids[:, :4], ids[:1, :1]):  # expanded, straight, one token
            found, expected = model(some.cuda()).logits.cpu().float(), dense(some).logits.float()
            assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
    new = model.generate(ids[:1].cuda(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert new.shape == (1, 25)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_two_of_four_on_tensor_cores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    dense = LlamaForCausalLM(config).bfloat16().eval()
    for name, weight in dense.named_parameters():
        if "_proj" in name:
            groups = weight.data.view(len(weight), -1, 4)
            groups.scatter_(2, groups.abs().topk(2, dim=2, largest=False).indices, 0)
    compress(save(dense, tmp_path / "dense"), tmp_path / "compressed")
    model = load_model(tmp_path / "compressed", "cuda")
    layers = sum(isinstance(module, SparseLinear) for module in model.modules())
    assert semi_structured.to_semi_structured(model) == layers == 14
    ids = torch.arange(40).view(2, 20) * 7 % 320
    with torch.no_grad():
        found = model(ids.cuda()).logits.cpu().float()
    expected = logits(dense).float()
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


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
