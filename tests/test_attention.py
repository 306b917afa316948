"""A new token's attention, heads of a group together, against the formula in float64 and within models."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import decoders
from secateurs.attention import grouped_attention, token_by_token

SAMPLE = ("llama", "qwen3", "mistral", "gemma3", "phi3", "deepseek_v32", "glm_moe_dsa")
"""With groups and without, windows, and two that look at what their attention is called."""


@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    groups=st.integers(1, 4),
    before=st.integers(1, 9),
    scaling=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 100),
)
def test_one_token(
    batch: int, shared: int, groups: int, before: int, scaling: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, shared * groups, 1, 8, generator=generator)
    key, value = torch.randn(2, batch, shared, before, 8, generator=generator)
    module: Any = nn.Module()
    module.num_key_value_groups = groups
    output, _ = grouped_attention(
        module, query, key, value, None, scaling=scaling, position_ids=torch.ones(1)
    )
    for head in range(shared * groups):
        own, of = query[:, head, 0].double(), head // groups
        scores = torch.einsum("bd,bld->bl", own, key[:, of].double()) * (scaling or 8**-0.5)
        expected = torch.einsum("bl,bld->bd", scores.softmax(-1), value[:, of].double())
        torch.testing.assert_close(output[:, 0, head].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 100.0)]
)
def test_one_token_in_half_the_bits(dtype: torch.dtype, scale: float) -> None:
    """As near to float64 as transformers' eager attention, and finite where sums of products are not."""
    generator = torch.Generator().manual_seed(0)
    query = (scale * torch.randn(2, 6, 1, 64, generator=generator)).to(dtype)
    key, value = (scale * torch.randn(2, 2, 2, 40, 64, generator=generator)).to(dtype)
    module: Any = nn.Module()
    module.num_key_value_groups = 3
    output, _ = grouped_attention(module, query, key, value / scale, None)
    keys, values = (each.double().repeat_interleave(3, dim=1) for each in (key, value / scale))
    expected = ((query.double() @ keys.mT / 8).softmax(-1) @ values).transpose(1, 2)
    assert (output - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


WITHOUT = ("blt", "recurrent_gemma")
"""One makes no cache, the other says something else each time."""


@pytest.mark.parametrize("name", decoders.sampled(SAMPLE, WITHOUT))
def test_models_say_the_same(name: str) -> None:
    """With a sliding window, norms of heads and what else there is."""
    model = decoders.build(name).float().eval()
    ids = torch.randint(3, 100, (2, 5), generator=torch.Generator().manual_seed(0))
    settings = {
        "max_new_tokens": 30,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = model.generate(ids, **settings)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with token_by_token(20):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        ours = model.generate(ids, **settings)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
