"""Contexts that are only read: nothing but their own share of gradients is missing, decoder by decoder."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_callback import lora
from test_head import loss_and_gradients
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicLayer

import decoders
from families import build, tokens
from secateurs.training.context import context_length, context_read_only, divided
from secateurs.training.head import logits_where_labels
from secateurs.training.sparse import SparseTraining

SAMPLE = ("llama", "qwen3", "gemma3", "gpt2", "opt", "bloom", "qwen3_moe", "deepseek_v3", "glm4", "olmo2")
STATES = (
    *("bailing_hybrid", "deepseek_v4", "falcon_mamba", "jamba", "kimi_linear", "mamba", "mamba2", "minimax"),
    *("olmo_hybrid", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"),
)
"""What layers keep of a context is more than its keys and values."""

CHOOSING = ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text")
"""Attention looks at the best of all positions."""

WITHOUT = (*STATES, *CHOOSING, "blt", "cpmant", "ctrl", "llama4", "llama4_text", "openai-gpt")
"""The last keep nothing, or do not take padding on the left."""


def batch() -> dict[str, Tensor]:
    """Questions and answers of different lengths, one conversation padded, one without a question."""
    ids = tokens(4, 24)
    labels, mask = ids.clone(), torch.ones_like(ids)
    mask[1, 19:], mask[3, 9:] = 0, 0
    for row, (begin, end) in enumerate([(15, 24), (8, 19), (20, 22), (1, 9)]):
        labels[row, :begin], labels[row, end:] = -100, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@given(st.integers(1, 5), st.integers(2, 12), st.integers(0, 10**6), st.sampled_from([0, 0, 1, 4]))
def test_parts_make_up_the_batch(rows: int, length: int, seed: int, holes: int) -> None:
    """With labels anywhere, in padding too, and where `holes` is not 0 with padding anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    ids = torch.randint(1, 100, (rows, length), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row in range(rows):
        mask[row, : drawn(1, length + 1)] = 1
        for place in range(length):
            if drawn(0, 4) == 0:
                labels[row, place] = ids[row, place]
            if holes and drawn(0, 10) < holes:
                mask[row, place] = 0
    parts = divided(ids, mask, labels)
    if parts is None:
        return
    for row in range(rows):
        there = mask[row].bool()
        own = [(part, part.mask[row].bool()) for part in parts]
        assert torch.cat([part.ids[row, at] for part, at in own]).equal(ids[row, there])
        assert torch.cat([part.positions[row, at] for part, at in own]).equal(there.nonzero().flatten())
        first, *others = parts[1].positions[row, own[1][1]].tolist()
        learnt = {place for place in range(1, length) if labels[row, place] != -100}
        # A label right behind the last token is predicted by it.
        assert learnt <= {*others, int(there.sum())}
        assert not learnt or first == min(learnt) - 1


def detached_context(model: nn.Module, first: Tensor, length: int) -> list[Any]:
    """Hooks by which the whole model learns nothing from tokens before `first` (sequences,) of each."""
    context = (torch.arange(length) < first[:, None])[..., None]

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states = torch.where(context, states.detach(), states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layers: Any = model.get_submodule("model.layers")
    return [
        module.register_forward_hook(cut)
        for layer in layers
        for module in (layer, layer.self_attn.k_proj, layer.self_attn.v_proj)
    ] + [model.get_submodule("model.embed_tokens").register_forward_hook(cut)]


@pytest.mark.parametrize("wrapped", ["plain", "lora", "sparse", "logits"])
def test_gradients_are_those_of_what_follows(wrapped: str) -> None:
    """Against the whole model in one pass, with the context's states detached."""
    torch.manual_seed(0)
    model = build("llama")
    bare = model
    if wrapped == "lora":
        model = lora(model)
    if wrapped == "sparse":
        optimizer = torch.optim.AdamW(model.parameters())
        sparse = SparseTraining(0.5, schedule="constant", importance="magnitude")
        sparse.attach(model, optimizer, total_steps=1)
    model.train()
    inputs = batch()
    first = (inputs["labels"] != -100).long().argmax(1) - 1
    hooks = detached_context(bare, first, 24)
    loss, gradients, own = loss_and_gradients(model, inputs)
    for hook in hooks:
        hook.remove()
    lean: Any = logits_where_labels(model) if wrapped == "logits" else nullcontext()
    with lean, context_read_only(model) as does:
        assert does
        found, others, output = loss_and_gradients(model, inputs)
        if wrapped != "logits":
            there = inputs["attention_mask"].bool()
            torch.testing.assert_close(output.logits[there], own.logits[there], rtol=1e-5, atol=1e-5)
        assert context_length(model) == (14 + 7 + 19 + 0) / 4
        model.eval()
        assert model(**inputs).logits.shape == (4, 24, 128)
        assert context_length(model) == 0
    assert context_length(model) is None
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    assert len(gradients) == len(others)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def learnt(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient of what the head is given, (tokens with labels, hidden)."""
    given: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    loss = model(**inputs).loss
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, given)
    predicting = torch.cat([inputs["labels"][:, 1:] != -100, torch.zeros(4, 1, dtype=torch.bool)], dim=1)
    return loss.detach(), gradient[predicting]


@pytest.mark.parametrize("name", decoders.sampled(SAMPLE, WITHOUT))
def test_decoders(name: str) -> None:
    """The loss and what the head hands back are the model's own."""
    model = decoders.build(name).float()
    loss, gradient = learnt(model.eval(), batch())
    with context_read_only(model) as does:
        assert does
        model.training = True  # and nothing within it: no dropout
        found, other = learnt(model, batch())
        assert context_length(model) == 10
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITHOUT)
def test_decoders_that_do_not(name: str, dtype: torch.dtype) -> None:
    model = decoders.build(name).to(dtype).train()
    with context_read_only(model) as does:
        assert not does
        assert context_length(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1])
def test_the_proof_sees_wrong_gradients_and_losses(
    factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where keys and values of a context come back as others."""
    model = build("llama", dtype)
    with context_read_only(model) as does:
        assert does

    def changed(layer: DynamicLayer, *states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        keys, values = update(layer, *states)
        if keys.shape[2] > states[0].shape[2]:
            values = torch.cat([values[:, :, : -states[1].shape[2]] * factor, states[1]], dim=2)
        return keys, values

    update = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", changed)
    with context_read_only(model) as does:
        assert not does


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_by_length(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope)
    with context_read_only(AutoModelForCausalLM.from_config(config)) as does:
        assert not does


def test_calls_that_stay_as_they_are() -> None:
    model = build("llama").train()
    inputs = batch()
    with context_read_only(model):
        hole, late = inputs["attention_mask"].clone(), inputs["labels"].clone()
        hole[0, 5], late[3, 12] = 0, 7
        for call in (
            {**inputs, "labels": inputs["input_ids"]},
            {**inputs, "position_ids": torch.arange(24).expand(4, 24)},
            {**inputs, "output_hidden_states": True},
            {**inputs, "attention_mask": inputs["attention_mask"].flip(1)},
            {**inputs, "attention_mask": hole},
            {**inputs, "labels": late},
            {"input_ids": inputs["input_ids"]},
        ):
            assert model(**call).logits.shape == (4, 24, 128)
            assert context_length(model) == 0
        model(**{**inputs, "attention_mask": inputs["attention_mask"].float()})
        assert context_length(model) == 10
        with context_read_only(model) as does:
            assert does
        model(**inputs)
        assert context_length(model) == 10
    model.gradient_checkpointing_enable()
    with context_read_only(model) as does:
        assert not does


def test_losses_of_routers_are_those_of_all_tokens() -> None:
    model = decoders.build("qwen3_moe").float().train()
    inputs = {**batch(), "output_router_logits": True}
    wanted = model(**inputs)
    with context_read_only(model) as does:
        assert does
        found = model(**inputs)
    assert found.loss == wanted.loss
    assert found.aux_loss == wanted.aux_loss


def test_a_forward_pass_of_others_stays() -> None:
    model = build("llama").train()
    inner, calls = model.model, list[Any]()
    make = inner.forward

    def forward(**told: Any) -> Any:
        calls.append(told["input_ids"].shape)
        return make(**told)

    inner.forward = forward
    with context_read_only(model):
        assert inner.forward is not forward
    assert inner.forward is forward
    assert calls


def test_under_autocast() -> None:
    """Weights that were cast for the context, without gradients, are not taken for what follows."""
    model = build("llama").train()
    with torch.autocast("cpu", torch.bfloat16), context_read_only(model) as does:
        assert does
        _, gradients, _ = loss_and_gradients(model, batch())
    assert len(gradients) == len(list(model.parameters()))
    assert all(gradient.any() for gradient in gradients)


def test_operations_of_its_backward_pass_are_saved() -> None:
    """Counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build("llama").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ids = tokens(2, 64)
    labels = ids.clone()
    labels[:, :49] = -100
    spent, counted = [], []
    for reads in (False, True):
        sparse = SparseTraining(0.0, importance="uniform")
        sparse.attach(model, optimizer, total_steps=2)
        with context_read_only(model) if reads else nullcontext():
            with FlopCounterMode(display=False) as counter:
                model(input_ids=ids, labels=labels).loss.backward()
            counted.append(counter.get_total_flops())
            spent.append(sparse.flops_done / sparse.flops_dense)
        sparse.detach()
    assert spent[0] == 1
    assert spent[1] == pytest.approx(counted[1] / counted[0], rel=0.1)
