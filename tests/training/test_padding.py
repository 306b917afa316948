"""Batches without their padding: the same loss and gradients, decoder by decoder."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_callback import lora
from test_context import batch
from test_head import loss_and_gradients
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import decoders
from families import build
from secateurs.training.context import context_length, context_read_only
from secateurs.training.head import logits_where_labels
from secateurs.training.importance import METRICS
from secateurs.training.padding import without_padding
from secateurs.training.rows import AttentionInBlocks
from secateurs.training.sparse import SparseTraining

SAMPLE = ("llama", "qwen3", "gemma3", "gpt2", "mistral3", "qwen3_moe", "glm4", "olmo2")
RUNNING_ON = (
    *("falcon_h1", "jamba", "lfm2", "lfm2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "zamba", "bamba"),
    *("kimi_linear", "lfm3", "nemotron_h", "qwen3_5", "qwen3_5_text", "qwen3_next", "zamba2"),
)
"""Something goes from token to token, whatever the mask: little where weights are new."""

WITHOUT = (
    *RUNNING_ON,
    *("afmoe", "axk2", "bailing_hybrid", "biogpt", "bloom", "blt", "codegen", "cpmant", "ctrl"),
    *("deepseek_v32", "deepseek_v4", "doge", "dots3_note_text", "falcon", "falcon+new", "falcon+old"),
    *("falcon_mamba", "flint", "gemma2", "glm_moe_dsa", "gpt_neo", "gpt_neox_japanese", "gpt_oss"),
    *("gptj", "granite_swa", "granitemoe_swa", "granitemoehybrid", "hy_v4", "inkling2_text"),
    *("inkling_text", "llama4", "llama4_text", "mamba", "mamba2", "mimo_v2_flash", "minimax"),
    *("minimax_m3_vl_text", "mpt", "olmo_hybrid", "openai-gpt", "opt", "qwen2_5_vl", "qwen4_exp_text"),
    *("recurrent_gemma", "rwkv", "vaultgemma", "xglm", "xlstm", "zaya"),
)
"""These too have masks or kernels of their own, or look at the whole of a text."""

KEEPING = ("blt", "rwkv")
"""They fail by their own code where they learn and are not told to keep no states."""

JOINED = (1, 24 + 19 + 24 + 9)
"""The batch, its tokens in one row."""


def rows_of(model: Any) -> list[tuple[int, ...]]:
    """Will hold the sequences and tokens of every pass through the model."""
    rows: list[tuple[int, ...]] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, states: rows.append(tuple(states.shape[:2])))
    return rows


@pytest.mark.parametrize("wrapped", ["plain", "lora", "logits", "checkpointing"])
def test_loss_and_gradients(wrapped: str) -> None:
    torch.manual_seed(0)
    model: Any = build("llama")
    bare: Any = model
    if wrapped == "lora":
        model = lora(model)
    inputs, rows = batch(), rows_of(bare)
    if wrapped == "checkpointing":
        model.gradient_checkpointing_enable()
    model.train()
    loss, gradients, own = loss_and_gradients(model, inputs)
    lean: Any = logits_where_labels(model) if wrapped == "logits" else nullcontext()
    with lean, without_padding(model) as does:
        assert does
        found, others, output = loss_and_gradients(model, inputs)
        assert rows[-1] == JOINED
        if wrapped != "logits":
            there = inputs["attention_mask"].bool()
            torch.testing.assert_close(output.logits[there], own.logits[there], rtol=1e-5, atol=1e-5)
            assert output.logits.shape == own.logits.shape
    model(**inputs)
    assert rows[-1] == (4, 24)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    assert len(gradients) == len(others)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_sparse_steps(metric: Any) -> None:
    """Importance is measured on the batch as it is, and then the step is made without padding."""

    def made(context: Callable[[nn.Module], Any]) -> tuple[Tensor, list[Tensor], float]:
        torch.manual_seed(0)
        model: Any = build("llama").train()
        sparse = SparseTraining(0.5, schedule="constant", importance=metric)
        sparse.attach(model, torch.optim.SGD(model.parameters()), total_steps=1)
        rows = rows_of(model)
        with context(model):
            loss, gradients, _ = loss_and_gradients(model, batch())
        assert rows[-1] == ((4, 24) if context is nullcontext else JOINED)
        return loss, gradients, sparse.flops_dense

    loss, gradients, flops = made(nullcontext)
    found, others, same = made(without_padding)
    assert flops == same
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", decoders.sampled((*SAMPLE, "opt"), KEEPING))
def test_decoders(name: str) -> None:
    """Where it is proved, all gradients are the model's own; and where not, all is as it was."""
    model: Any = decoders.build(name).float().eval()
    inputs, rows = batch(), rows_of(model)
    loss, gradients, _ = loss_and_gradients(model, inputs)
    model.training = True  # and nothing within it: no dropout
    with without_padding(model) as does:
        assert does == (name not in WITHOUT)
        found, others, _ = loss_and_gradients(model, inputs)
        assert (rows[-1] == JOINED) == does
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=0)
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() <= 1e-3 * one.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*RUNNING_ON, *KEEPING])
def test_what_runs_on_is_seen_however_little_it_is(name: str, dtype: torch.dtype) -> None:
    model: Any = decoders.build(name).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with without_padding(model) as does:
        assert not does


def test_other_contexts() -> None:
    """Contexts that are only read go first; where they leave a call as it is, its padding is left out."""
    model: Any = build("llama").train()
    inputs, rows = batch(), rows_of(model)
    with ExitStack() as stack:
        for context in (without_padding, context_read_only, without_padding):
            assert stack.enter_context(context(model))
        model(**inputs)
        assert context_length(model) == 10
        model(**{**inputs, "labels": inputs["input_ids"].where(inputs["attention_mask"] != 0, -100)})
        assert context_length(model) == 0
        assert rows[-1] == JOINED
    model(**inputs)
    assert rows[-1] == (4, 24)


def test_long_batches_are_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama").train()
    inputs, rows = batch(), rows_of(model)
    loss, gradients, _ = loss_and_gradients(model, inputs)
    with without_padding(model):
        monkeypatch.setattr("secateurs.training.padding.ROW", 45)
        found, others, _ = loss_and_gradients(model, inputs)
    assert rows[-2:] == [(1, 43), (1, 33)]
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_calls_that_stay_as_they_are() -> None:
    model: Any = build("llama").train()
    inputs, rows = batch(), rows_of(model)
    with without_padding(model):
        hole = inputs["attention_mask"].clone()
        hole[0, 5] = 0
        for call in (
            {**inputs, "attention_mask": torch.ones_like(hole)},
            {**inputs, "labels": inputs["input_ids"]},  # of padding, too
            {**inputs, "position_ids": torch.arange(24).expand(4, 24)},
            {**inputs, "output_hidden_states": True},
            {**inputs, "attention_mask": inputs["attention_mask"].flip(1)},
            {**inputs, "attention_mask": hole},
            {"input_ids": inputs["input_ids"]},
        ):
            assert model(**call).logits.shape == (4, 24, 128)
            assert rows[-1] == (4, 24)
        assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 24
        assert model.eval()(**inputs).past_key_values.get_seq_length() == 24
        model.train()(**inputs)
        assert rows[-1] == JOINED
        model.get_input_embeddings().neftune_noise_alpha = 5.0
        model(**inputs)
        assert rows[-1] == (4, 24)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_kernels(implementation: str) -> None:
    model: Any = build("llama").train()
    model.set_attn_implementation(implementation)
    with without_padding(model) as does:
        assert not does


def test_the_proof_sees_what_crosses_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP that looks at the token before, as a short convolution does."""
    model: Any = build("llama").train()
    mlp = model.model.layers[1].mlp
    make = mlp.forward
    mlp.forward = lambda states: make(states + 1e-6 * states.roll(1, dims=1))
    with without_padding(model) as does:
        assert not does


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 2**31))
def test_attention_in_blocks(lengths: list[int], window: int, seed: int) -> None:
    """Causal blocks with a window are attended to one by one, and any other mask as a whole."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    query = torch.randn(1, 4, tokens, 8, generator=generator)
    key, value = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(2))
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    places = torch.arange(tokens)
    behind = places[:, None] - places
    blocks = (row[:, None] == row) & (behind >= 0) & (behind < window)
    others = torch.rand(tokens, tokens, generator=generator) < 0.5
    others.fill_diagonal_(True)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    for mask in (blocks, others, others.tril()):
        attention = AttentionInBlocks(sdpa_attention_forward)
        found, _ = attention(module, query, key, value, mask[None, None], scaling=0.3)
        wanted, _ = sdpa_attention_forward(module, query, key, value, mask[None, None], scaling=0.3)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        if mask is blocks and window > 1:
            assert (attention.rows, attention.wholes) == ((1, 0) if len(lengths) > 1 else (0, 1))


def test_dropout_is_handed_on() -> None:
    seen: list[Any] = []

    def attend(module: nn.Module, query: Tensor, *_: Any, **more: Any) -> tuple[Tensor, None]:
        seen.append((query.shape[2], more))
        return query.transpose(1, 2), None

    row = torch.tensor([0, 0, 1, 1, 1])
    mask = ((row[:, None] == row) & torch.ones(5, 5).tril().bool())[None, None]
    states = torch.randn(1, 2, 5, 4)
    found, _ = AttentionInBlocks(attend)(nn.Module(), states, states, states, mask, dropout=0.1)
    assert found.equal(states.transpose(1, 2))
    assert seen == [(count, {"dropout": 0.1, "is_causal": True}) for count in (2, 3)]
