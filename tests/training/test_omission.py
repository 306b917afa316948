"""A step on some of the units equals one of the dense model with the others silenced, on every family."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel

import families
from families import build, tokens
from secateurs.training.cutting import Kept
from secateurs.training.omission import Omission
from secateurs.training.units import KINDS, Kind, Units

GROUPED = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
"""Key-value heads enough to omit whole ones, with their queries."""

READERS = {
    "llama": ("model.layers", ("self_attn.o_proj", "mlp.down_proj")),
    "opt": ("model.decoder.layers", ("self_attn.out_proj", "fc2")),
    "gpt2": ("transformer.h", ("attn.c_proj", "mlp.c_proj")),
    "gpt_neox": ("gpt_neox.layers", ("attention.dense", "mlp.dense_4h_to_h")),
}
"""Where the blocks are, and what reads heads and channels in them."""


@pytest.fixture(params=[*families.FAMILIES, "llama-grouped", "phi3-grouped"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if request.param in families.FAMILIES:
        return build(request.param, torch.float64)
    kind = {"llama-grouped": LlamaConfig, "phi3-grouped": Phi3Config}[request.param]
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**GROUPED), dtype=torch.float64)
    return made.eval()


def some_units(omission: Omission, seed: int = 0) -> list[dict[Kind, Tensor | None]]:
    """Half of the units of each block, at random; the last block's attention stays whole."""
    generator = torch.Generator().manual_seed(seed)

    def choose(units: Units) -> Tensor:
        order = torch.rand(units.groups, units.size, generator=generator).argsort(1)
        return order < max(1, units.size // 2)

    kept = [dict[Kind, Tensor | None](dict.fromkeys(KINDS)) for _ in omission.blocks]
    for masks, block in zip(kept, omission.blocks, strict=True):
        masks |= {kind: choose(units) for kind, units in block.units.items()}
    kept[-1]["attention"] = None
    return kept


def silence(model: PreTrainedModel, kept: Kept) -> None:
    """Zero what omitted units hand to the layers that read them (o, down), by the plain model's own code."""
    path, layers = READERS.get(model.config.model_type, READERS["llama"])
    for block, masks in zip(model.get_submodule(path).children(), kept, strict=True):
        for kind, name in zip(KINDS, layers, strict=True):
            mask = masks[kind]
            if mask is None:
                continue
            layer: Any = block.get_submodule(name)
            # In the order of their groups; a head's columns, of a unit's all heads, lie side by side.
            weight = layer.weight.T if name.endswith("c_proj") else layer.weight
            factor = mask.flatten().repeat_interleave(weight.shape[1] // mask.numel()).double()

            def multiply(_: nn.Module, args: tuple[Tensor], factor: Tensor = factor) -> tuple[Tensor]:
                return (args[0] * factor,)

            layer.register_forward_pre_hook(multiply)


def loss_of(model: nn.Module) -> Tensor:
    logits = model(tokens()).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, tokens()[:, 1:].flatten())


def whole_gradients(model: nn.Module, omission: Omission) -> dict[str, Tensor | None]:
    """Gradients as those of the whole parameters."""
    small = {id(piece.parameter): piece for piece in omission.slices if piece.index is not None}
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        piece = small.get(id(parameter)) if omission.in_place else None
        if gradient is not None and piece is not None:
            shape = list(gradient.shape)
            shape[piece.dim] = len(piece.unit)
            gradient = gradient.new_zeros(shape).index_copy(piece.dim, piece.index, gradient)
        gradients[name] = gradient
    return gradients


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_the_dense_model_with_neurons_silenced(
    model: PreTrainedModel, in_place: bool, recompute: bool
) -> None:
    if recompute:
        model.train()  # or transformers does not checkpoint; the tiny models must not drop out
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    dense = deepcopy(model)
    if recompute:
        model.activation_checkpointing_enable()
    keys = list(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    omission = Omission(model, in_place=in_place)
    kept = some_units(omission)
    omission.choose(kept)
    omission.engage()
    loss = loss_of(model)
    loss.backward()

    silence(dense, kept)
    expected = loss_of(dense)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = whole_gradients(model, omission)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-13, msg=name)

    omission.disengage()
    after = model.state_dict()
    assert list(after) == keys
    assert all(torch.equal(after[name], before[name]) for name in keys)


def test_products_run_at_the_reduced_size(model: PreTrainedModel) -> None:
    sizes: dict[bool, list[Any]] = {}
    for in_place in (True, False):
        omission = Omission(model, in_place=in_place)
        omission.choose(some_units(omission))
        omission.engage()
        seen = sizes[in_place] = []

        def note(_: nn.Module, args: tuple[Tensor], out: Tensor, seen: list[Any] = seen) -> None:
            seen.append((args[0].shape, out.shape))

        hooks = [
            layer.module.register_forward_hook(note)
            for block in omission.blocks
            for layers in block.layers.values()
            for layer in layers
        ]
        with torch.no_grad():
            model(tokens())
        for hook in hooks:
            hook.remove()
        omission.disengage()
    assert sizes[True] == sizes[False]
    (_, up), (down, _) = sizes[True][-2:]
    assert up[-1] in (down[-1], 2 * down[-1])  # gate and up in one layer
    assert down[-1] == omission.blocks[-1].units["mlp"].count // 2


def test_an_evaluation_between_backward_and_step_loses_no_gradient() -> None:
    model = build("llama", torch.float64)
    omission = Omission(model, in_place=True)
    omission.choose(some_units(omission))
    omission.engage()
    loss_of(model).backward()
    expected = whole_gradients(model, omission)
    omission.disengage()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name])
    omission.engage()
    for name, gradient in whole_gradients(model, omission).items():
        assert torch.equal(gradient, expected[name])


def test_a_quantised_layer_is_refused() -> None:
    model = build("llama")
    layer = model.model.layers[1].mlp.up_proj
    packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj.*quantised"):
        Omission(model, in_place=True)


def test_small_weights_are_dense_views_of_the_only_copy() -> None:
    model = build("llama")
    down = model.model.layers[0].mlp.down_proj
    omission = Omission(model, in_place=True)
    omission.choose(some_units(omission))
    omission.engage()
    assert down.weight.shape == (48, 40)
    assert down.weight.T.is_contiguous()  # dense, as fused optimisers need it
    assert down.weight.untyped_storage().nbytes() == 4 * 48 * 80
