"""One block at a time: what a block holds is what transformers loads for it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
import folders
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.pruning.walk import prune


def assert_walks_as_whole(folder: Path) -> None:
    """Block by block, hidden states are those of the whole model."""
    ids = families.tokens(2, 16)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = BlockwiseModel(Checkpoint(folder), torch.device("cpu"))
    [batch] = model.embed(ids, batch_size=2)
    inputs: list[torch.Tensor] = []
    for block in whole.get_submodule(model.path).children():
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.register_forward_hook(
            lambda _, args, out: inputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        whole(ids)
    for index in range(len(model.blocks)):
        assert torch.equal(batch.states, inputs[2 * index])
        with model.block(index):
            assert torch.equal(model.run(index, batch), inputs[2 * index + 1])
            model.push(index, batch)
        assert torch.equal(batch.states, inputs[2 * index + 1])
        assert all(parameter.is_meta for parameter in model.blocks[index].parameters())


def test_buffers_in_files_are_the_blocks(tmp_path: Path) -> None:
    gemma4 = pytest.importorskip("transformers.models.gemma4")
    config = gemma4.Gemma4TextConfig(
        vocab_size=families.VOCABULARY,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=80,
        head_dim=8,
        global_head_dim=8,
        max_position_embeddings=64,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=families.VOCABULARY,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    scalars = {name: buffer for name, buffer in model.named_buffers() if "layer_scalar" in name}
    for index, buffer in enumerate(scalars.values()):
        buffer.fill_(0.5 + index / 4)
    model.save_pretrained(tmp_path / "model")
    assert_walks_as_whole(tmp_path / "model")
    prune(tmp_path / "model", output=tmp_path / "out", method="magnitude", pattern="50%")
    after = folders.tensors_of(tmp_path / "out")
    assert {name: float(after[name]) for name in scalars} == {n: float(b) for n, b in scalars.items()}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-350m", "gemma2"])
def test_a_block_is_what_transformers_loads(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    assert_walks_as_whole(folders.save(tmp_path, family, stored))
