"""Sparse training of all kinds of decoders: each block is cut where a proof says that it can be."""

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from decoders import build, tokens
from secateurs.training.masks import Masks
from secateurs.training.omission import Omission
from secateurs.training.profile import measure_activity, table
from secateurs.training.sparse import SparseTraining
from secateurs.training.units import KINDS, Kind

CUT = {
    "granite": ("hc", "hc"),
    "cohere2": ("hc", "hc"),  # attention and MLP side by side
    "glm": ("hc", "hc"),  # gate and up in one matrix
    "gpt_bigcode": ("hc", "hc"),  # one key-value head, fused with the queries
    "qwen3_5_text": ("c", "hc"),  # linear attention; heads that are gated
    "nemotron_h": ("", "c", "h", "c"),  # one mixer to a block
    "qwen3_moe": ("hc", "h"),  # experts run whole
    "deepseek_v3": ("c", "c"),  # latent attention; a shared expert
    "olmo2": ("c", "c"),  # norms over all heads
    "gemma4_text": ("c", "c", "c", "c"),  # keys and values are handed on to later blocks
    "falcon+old": ("c", "c"),  # attention by its own code
    "mistral3": ("hc", "hc"),  # with a part that sees
}
"""What is cut of each block: h for heads, c for channels."""


def exact(name: str) -> Any:
    model = build(name, torch.float64)
    model.set_experts_implementation("eager")  # others take no float64
    return model


def loss_of(model: nn.Module) -> Tensor:
    logits = model(input_ids=tokens(), use_cache=False).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, tokens()[:, 1:].flatten())


@pytest.mark.parametrize("name", CUT)
def test_a_step_on_some_units_is_that_of_the_model_with_the_others_silenced(name: str) -> None:
    dense = exact(name)
    found = Omission(dense, in_place=True)
    assert tuple("".join(kind[0] for kind in block.cuts) for block in found.blocks) == tuple(
        what.replace("h", "a").replace("c", "m") for what in CUT[name]
    )
    generator = torch.Generator().manual_seed(0)
    kept = [dict[Kind, Tensor | None](dict.fromkeys(KINDS)) for _ in found.blocks]
    for masks, block in zip(kept, found.blocks, strict=True):
        for kind, units in block.units.items():
            order = torch.rand(units.groups, units.size, generator=generator).argsort(1)
            masks[kind] = mask = order < units.size // 2
            width = block.reader(kind).module.weight.numel() // dense.get_input_embeddings().weight.shape[1]
            factor = mask.flatten().repeat_interleave(width // mask.numel()).double()
            block.readers[kind].register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor,))
    expected = loss_of(dense)
    expected.backward()
    for in_place in (True, False):
        model = exact(name)
        omission = Omission(model, in_place=in_place)
        omission.choose(kept)
        omission.engage()
        loss = loss_of(model)
        loss.backward()
        omission.disengage()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # some norms are of float32
        for (path, one), other in zip(model.named_parameters(), dense.parameters(), strict=True):
            if other.grad is not None:
                one_grad = torch.zeros_like(one) if one.grad is None else one.grad
                torch.testing.assert_close(one_grad, other.grad, rtol=1e-5, atol=1e-7, msg=path)


@pytest.mark.parametrize("name", ["olmo2", "nemotron_h", "qwen3_moe"])
def test_training_says_what_runs_whole(name: str) -> None:
    model = build(name).train()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    sat = SparseTraining(0.5, schedule="constant", across_layers=True, select="sample", probe_every=1)
    said = {
        "olmo2": "heads of all 2 blocks run whole",
        "nemotron_h": "heads of 3 of 4 blocks and channels of 2 of 4 blocks run whole",
        "qwen3_moe": "channels of 1 of 2 blocks run whole",
    }
    with pytest.warns(UserWarning, match=said[name]):
        sat.attach(model, optimizer, total_steps=3)
    before = deepcopy(model.state_dict())
    for step in range(3):
        model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        sat.step()
        optimizer.zero_grad()
    assert sat.flops_done > 0
    state = sat.state_dict()
    sat.load_state_dict(state)
    sat.detach()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[key].shape == before[key].shape for key in after)


def test_a_model_of_which_nothing_can_be_cut_is_refused_in_a_line() -> None:
    model = build("mamba2")
    with pytest.raises(ValueError, match="neither heads nor channels of 'mamba2' can be left out"):
        SparseTraining(0.5).attach(model, AdamW(model.parameters()), total_steps=3)


def test_attaching_leaves_random_numbers_alone() -> None:
    model = build("diffllama")
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SparseTraining(0.5).attach(model, AdamW(model.parameters()), total_steps=3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_zeros_of_experts_are_held() -> None:
    model: Any = build("qwen3_moe").train()
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight[weight.abs() < weight.abs().median()] = 0
    zeros = [weight == 0 for weight in (experts.gate_up_proj, experts.down_proj)]
    optimizer = AdamW(model.parameters(), lr=1e-2)
    Masks.of_zeros(model).attach(optimizer)
    before = experts.down_proj.detach().clone()
    for step in range(3):
        model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(experts.gate_up_proj == 0, zeros[0])
    assert torch.equal(experts.down_proj == 0, zeros[1])
    assert not torch.equal(experts.down_proj, before)


def test_profiles_show_what_there_is() -> None:
    blocks = measure_activity(build("nemotron_h"), tokens())
    shown = ["".join(kind[0] for kind in ("heads", "channels") if getattr(b, kind)) for b in blocks]
    assert shown == ["", "c", "h", "c"]
    assert table(blocks).row_count == 4
