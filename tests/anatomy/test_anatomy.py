"""What is derived, held against a table written by hand, and against transformers' tensor-parallel plans."""

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from transformers import BloomConfig, PretrainedConfig
from transformers.activations import ACT2FN

import decoders
import families
import table
from secateurs.anatomy import BlockAnatomy, UnsupportedArchitectureError, anatomy_of, skeleton

PLAN = dict.fromkeys(("q", "k", "v", "gate", "up"), "colwise") | dict.fromkeys(("o", "down"), "rowwise")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_it_is_what_the_table_says(name: str) -> None:
    config = families.FAMILIES[name]
    family, anatomy = table.family_of(config), anatomy_of(config)
    assert anatomy.path == family.blocks
    assert len(anatomy.blocks) == config.num_hidden_layers
    for block in anatomy.blocks:
        assert_block_is(block, family, config)


def assert_block_is(block: BlockAnatomy, family: table.Family, config: PretrainedConfig) -> None:
    assert tuple(tuple(matrix.name for matrix in group) for group in block.groups) == family.groups
    assert {name: set(roles) for name, roles in block.roles.items()} == {
        layer.name: set(layer.roles) for group in family.attention + family.mlp for layer in group
    }
    assert not block.dense
    assert block.adds == family.adds(config)
    assert set(block.factors.values()) <= {1.0}
    (mlp,), sizes = block.mlps, family.sizes(config)
    assert mlp.gated == ("gate" in family.roles)
    wanted = ACT2FN[getattr(config, family.activation)]
    module = dict(skeleton(config).get_submodule(family.blocks)[0].named_modules())[mlp.activation or ""]  # type: ignore[index]
    assert type(module) is type(wanted)
    heads = block.heads
    assert heads is not None
    assert (heads.count, heads.kv_count, heads.dim) == (sizes.heads, sizes.kv_heads, sizes.head_dim)
    assert torch.equal(heads.columns, torch.arange(sizes.heads).repeat_interleave(sizes.head_dim))
    for known, roles in ((heads.query_rows, {"q"}), (heads.key_rows, {"k", "v"})):
        for layer in (layer for group in family.attention[:-1] for layer in group):
            owner = torch.full((block.matrices[layer.name].shape[0],), -1)
            for role, rows in layer.split(torch.arange(len(owner)), sizes).items():
                if role in roles:
                    owner[rows] = torch.arange(len(rows))[:, None].expand(rows.shape)
            if (owner >= 0).any():
                assert torch.equal(known[layer.name], owner)


@pytest.mark.parametrize("name", decoders.NAMES)
def test_roles_agree_with_plans_of_tensor_parallelism(name: str) -> None:
    """Where transformers says how a matrix is shared out between devices: by rows what writes, by columns
    what reads."""
    config = decoders.config_of(name)
    try:
        anatomy = anatomy_of(config)
    except UnsupportedArchitectureError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    plan: dict[str, Any] = skeleton(config).tp_plan or {}
    for index, block in enumerate(anatomy.blocks):
        for matrix, roles in block.roles.items():
            if block.matrices[matrix].expert is not None:
                continue
            full = f"{anatomy.path}.{index}.{matrix}"
            plans = [value for pattern, value in plan.items() if fnmatchcase(full, pattern)]
            if plans and plans[0] in ("colwise", "rowwise"):
                assert plans[0] == PLAN[roles[0]], full


def test_residual_multipliers_are_found() -> None:
    [block, _] = anatomy_of(decoders.config_of("granite")).blocks
    assert block.adds
    assert set(block.factors.values()) == {decoders.config_of("granite").residual_multiplier}


def test_it_takes_no_memory_and_reads_nothing() -> None:
    """A model of hundreds of gigabytes, by its configuration alone."""
    config = BloomConfig(hidden_size=14336, n_layer=70, n_head=112)
    anatomy = anatomy_of(config)
    assert anatomy.blocks[0].groups[0][0].shape == (3 * 14336, 14336)
    assert all(parameter.is_meta for parameter in skeleton(config).parameters())


def test_a_caller_may_be_in_inference_mode() -> None:
    with torch.inference_mode():
        anatomy = anatomy_of(BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2))
    assert anatomy.blocks[0].adds
