"""Every claim of the table of families, checked by what real models do with their layers."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

import families
from families import WINDOW, build, tokens
from table import FAMILIES, Role, Sizes, UnsupportedArchitectureError, family_of, linear_weight


@pytest.fixture(params=families.FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param, dtype=torch.float64)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_submodule(family_of(model.config).blocks).children())


def layer_of(block: nn.Module, config: PretrainedConfig, role: Role) -> Any:
    return block.get_submodule(family_of(config).roles[role].name)


def part(tensor: Tensor, config: PretrainedConfig, role: Role) -> Tensor:
    """What belongs to `role` in a tensor that runs along the outputs of the role's layer."""
    family = family_of(config)
    return family.roles[role].split(tensor, family.sizes(config))[role]


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


@torch.no_grad()
def run(model: PreTrainedModel) -> Tensor:
    return model(tokens()).logits


def inputs_of_linears(model: PreTrainedModel) -> dict[nn.Module, Tensor]:
    """What each linear layer in the blocks receives as the model reads the text, in order of execution."""
    inputs: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert layer not in inputs
        [inputs[layer]] = args

    layers = [layer for block in blocks_of(model) for layer in linears_of(block).values()]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    run(model)
    for handle in handles:
        handle.remove()
    return inputs


def heads_into_o(model: PreTrainedModel) -> list[Tensor]:
    """What every head of each block hands to o (batch, tokens, heads, head_dim)."""
    sizes = family_of(model.config).sizes(model.config)
    inputs = inputs_of_linears(model)
    layers = [layer_of(block, model.config, "o") for block in blocks_of(model)]
    return [inputs[layer].unflatten(-1, (sizes.heads, sizes.head_dim)) for layer in layers]


def readers_of(kv_head: int, config: PretrainedConfig) -> list[int]:
    """The query heads that read a key-value head."""
    sizes = family_of(config).sizes(config)
    group = sizes.heads // sizes.kv_heads
    return list(range(kv_head * group, (kv_head + 1) * group))


def window_of(block: int, config: PretrainedConfig) -> int:
    """How many tokens a token of this block sees."""
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    layer_types = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    return WINDOW if layer_types[block] == "sliding_attention" else tokens().shape[1]


@torch.no_grad()
def zero_rows(block: nn.Module, config: PretrainedConfig, role: Role, unit: int) -> None:
    """Make one unit of `role` (a head or a channel) output zeros."""
    layer = layer_of(block, config, role)
    part(linear_weight(layer), config, role)[unit] = 0
    if layer.bias is not None:
        part(layer.bias, config, role)[unit] = 0


@torch.no_grad()
def zero_columns(block: nn.Module, config: PretrainedConfig, role: Role, columns: list[int]) -> None:
    linear_weight(layer_of(block, config, role))[:, columns] = 0


def test_every_family_has_a_model() -> None:
    assert {config.model_type for config in families.FAMILIES.values()} == set(FAMILIES)


def test_groups_are_all_linears_in_order_and_share_their_input(model: PreTrainedModel) -> None:
    groups = family_of(model.config).groups
    blocks = blocks_of(model)
    inputs = inputs_of_linears(model)
    assert len(blocks) == model.config.num_hidden_layers
    assert list(inputs) == [b.get_submodule(name) for b in blocks for group in groups for name in group]
    for block in blocks:
        assert sorted(linears_of(block)) == sorted(name for group in groups for name in group)
        by_group = [[inputs[block.get_submodule(name)] for name in group] for group in groups]
        assert all(x is group[0] for group in by_group for x in group)
        assert len({id(group[0]) for group in by_group}) == len(groups)


def test_attention_and_mlp_hold_their_roles(model: PreTrainedModel) -> None:
    family = family_of(model.config)
    attention = [[role for layer in group for role in layer.roles] for group in family.attention]
    mlp = [[role for layer in group for role in layer.roles] for group in family.mlp]
    assert attention == [["q", "k", "v"], ["o"]]
    assert mlp in ([["gate", "up"], ["down"]], [["up"], ["down"]])
    assert list(family.roles) == [role for group in attention + mlp for role in group]


def test_linear_weight_is_the_weight_that_the_layer_multiplies_by(model: PreTrainedModel) -> None:
    for module in linears_of(blocks_of(model)[0]).values():
        layer: Any = module
        weight = linear_weight(layer)
        assert weight.data_ptr() == layer.weight.data_ptr()
        x = torch.randn(3, weight.shape[1], dtype=weight.dtype)
        torch.testing.assert_close(nn.functional.linear(x, weight, layer.bias), layer(x))


def test_split_deals_out_every_row_once(model: PreTrainedModel) -> None:
    family = family_of(model.config)
    sizes = family.sizes(model.config)
    for layer in family.roles.values():
        rows = torch.arange(len(linear_weight(blocks_of(model)[0].get_submodule(layer.name))))
        parts = layer.split(rows, sizes)
        assert tuple(parts) == layer.roles
        assert torch.equal(torch.cat([part.flatten() for part in parts.values()]).sort().values, rows)


def test_mlp_by_hand(model: PreTrainedModel) -> None:
    config = model.config
    family = family_of(config)
    activation = ACT2FN[getattr(config, family.activation)]
    inputs = inputs_of_linears(model)
    for block in blocks_of(model):
        outputs: dict[Role, Tensor] = {}
        for role in family.roles.keys() & {"gate", "up"}:
            layer = layer_of(block, config, role)
            outputs[role] = inputs[layer] @ part(linear_weight(layer), config, role).T
            if layer.bias is not None:
                outputs[role] += part(layer.bias, config, role)
        gated = "gate" in outputs
        channels = activation(outputs["gate"]) * outputs["up"] if gated else activation(outputs["up"])
        torch.testing.assert_close(channels, inputs[layer_of(block, config, "down")])


def test_channels_are_rows_of_up_and_columns_of_down(model: PreTrainedModel) -> None:
    dense = run(model)
    twin = deepcopy(model)
    for block, twin_block in zip(blocks_of(model), blocks_of(twin), strict=True):
        zero_rows(block, model.config, "up", 5)  # every activation maps 0 to 0
        zero_columns(twin_block, model.config, "down", [5])
    pruned = run(model)
    assert not torch.allclose(pruned, dense)
    torch.testing.assert_close(pruned, run(twin))


def test_heads_are_rows_of_v_and_columns_of_o(model: PreTrainedModel) -> None:
    config = model.config
    dense = run(model)
    twin = deepcopy(model)
    head_dim = family_of(config).sizes(config).head_dim
    readers = readers_of(1, config)
    for block, twin_block in zip(blocks_of(model), blocks_of(twin), strict=True):
        zero_rows(block, config, "v", 1)
        zero_columns(
            twin_block, config, "o", [head * head_dim + i for head in readers for i in range(head_dim)]
        )
    for by_head in heads_into_o(model):
        silent = (by_head == 0).all(-1).all(1).all(0)  # (heads,)
        assert silent.nonzero().flatten().tolist() == readers
    pruned = run(model)
    assert not torch.allclose(pruned, dense)
    torch.testing.assert_close(pruned, run(twin))


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_which_tokens_and_heads_see_a_change(model: PreTrainedModel, role: Role) -> None:
    """A query serves its own head and token; a key or value, its readers at all tokens in the window."""
    config = model.config
    unit, token = 1, 5

    def nudge(_: nn.Module, args: Any, outputs: Tensor) -> None:
        head = part(outputs.movedim(-1, 0), config, role)[unit]  # (head_dim, batch, tokens)
        head[:, :, token] += torch.linspace(-1, 2, len(head), dtype=outputs.dtype).unsqueeze(1)

    before = heads_into_o(model)
    for i, block in enumerate(blocks_of(model)):
        handle = layer_of(block, config, role).register_forward_hook(nudge)
        after = heads_into_o(model)
        handle.remove()
        changed = ((before[i] - after[i]).abs() > 1e-9).any(0).any(-1)  # (tokens, heads)
        expected = torch.zeros_like(changed)
        if role == "q":
            expected[token, unit] = True
        else:
            expected[token : token + window_of(i, config), readers_of(unit, config)] = True
        assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (LlamaConfig(), Sizes(4096, 32, 32, 128, 11008)),
        (MistralConfig(), Sizes(4096, 32, 8, 128, 14336)),
        (Gemma2Config(), Sizes(2304, 8, 4, 256, 9216)),
        (OPTConfig(), Sizes(768, 12, 12, 64, 3072)),
        (GPT2Config(), Sizes(768, 12, 12, 64, 3072)),
        (GPT2Config(n_inner=1024), Sizes(768, 12, 12, 64, 1024)),
    ],
)
def test_sizes_of_default_configurations(config: PretrainedConfig, sizes: Sizes) -> None:
    assert family_of(config).sizes(config) == sizes


def test_unknown_architecture() -> None:
    with pytest.raises(UnsupportedArchitectureError) as error:
        family_of(BloomConfig(architectures=["BloomForCausalLM"]))
    message = str(error.value)
    assert "'bloom' (BloomForCausalLM)" in message
    assert all(name in message for name in FAMILIES)
    assert "To add it" in message
    assert "\n" not in message
