"""Experts are pruned by the tokens that the model's own router sends them, and by as many more as they have
inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import decoders
import secateurs
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.pruning.block.block import Block
from secateurs.pruning.block.experts import Gathering, channels, experts_of, route
from secateurs.pruning.block.measure import observe
from secateurs.pruning.solvers.statistics import Statistics


def routed_by_the_model(model: BlockwiseModel, index: int, home: str) -> list[Tensor]:
    """What transformers calls a block's experts with: hidden states, and which experts they go to."""
    seen: list[tuple[Any, ...]] = []
    module = model.blocks[index].get_submodule(home)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    for batch in model.embed(decoders.tokens(6, 24), batch_size=2):
        model.run(index, batch)
    handle.remove()
    hidden = torch.cat([args[0].flatten(0, -2) for args in seen])
    chosen = torch.cat([args[1] for args in seen])
    return [hidden[(chosen == expert).any(1)] for expert in range(4)]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "dbrx"])
def test_each_sees_its_own_tokens_and_as_many_drawn_from_all(name: str, tmp_path: Path) -> None:
    model = BlockwiseModel(Checkpoint(decoders.save(name, tmp_path)), torch.device("cpu"))
    hidden = model.embed(decoders.tokens(6, 24), batch_size=2)
    index = next(
        i
        for i, anatomy in enumerate(model.anatomy.blocks)
        if any(m.expert == 0 for m in anatomy.matrices.values())
    )
    with model.block(index):
        block = Block(model, index, {}, {})
        [experts] = experts_of(block)
        routed = route(block, hidden, experts)
        # In DBRX what is given tokens is the module around the one that holds the matrices.
        expected = routed_by_the_model(model, index, experts.home.removesuffix(".mlp"))
    width = experts.members[0].first[0].shape[1]
    assert routed.counts() == [len(tokens) for tokens in expected]
    assert len(routed.drawn) == width
    everything = torch.cat(expected)
    for number, tokens in enumerate(expected):
        own = torch.cat([rows.gathered() for rows in routed.own[number]])
        torch.testing.assert_close(own.sort(dim=0).values, tokens.sort(dim=0).values)
        # H = (c H_routed + k H_drawn) / (c + k)
        moments = Statistics(width)
        for part in routed.tokens(number):
            moments.update(part)
        sums = tokens.T @ tokens + routed.drawn.T @ routed.drawn
        torch.testing.assert_close(moments.moment, sums / (len(tokens) + width))
    assert all((everything == token).all(1).any() for token in routed.drawn)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("mixtral", 144),
        ("dbrx", 144),
        ("jetmoe", 144),  # cuts one tensor of all experts' tokens into parts
        ("llama4_text", 288),  # gives each expert tokens times its weight: they are no rows of one tensor
    ],
)
def test_tokens_are_kept_once_and_in_the_order_in_which_experts_are_given_them(
    name: str, rows: int, tmp_path: Path
) -> None:
    model = BlockwiseModel(Checkpoint(decoders.save(name, tmp_path, torch.bfloat16)), torch.device("cpu"))
    hidden = model.embed(decoders.tokens(6, 24), batch_size=2)
    with model.block(1):
        block = Block(model, 1, {}, {})
        [experts] = experts_of(block)
        routed = route(block, hidden, experts)
        firsts = [expert.first[0] for expert in experts.members]
        expected: list[list[Tensor]] = [[] for _ in firsts]
        for seen in observe(model, 1, hidden, inputs=firsts):
            for tokens, matrix in zip(expected, firsts, strict=True):
                given = seen.inputs[matrix.name].reshape(-1, 64)
                tokens.append(given[given.any(1)])
    for own, tokens in zip(routed.own, expected, strict=True):
        assert all(torch.equal(a.gathered(), b) for a, b in zip(own, tokens, strict=True))
    held = {each.source.data_ptr(): len(each.source) for own in routed.own for each in own}
    assert sum(held.values()) == rows
    pool = torch.cat([each for tokens in expected for each in tokens])
    places = torch.randperm(len(pool), generator=torch.Generator().manual_seed(1))[:64].sort().values
    assert torch.equal(routed.drawn, pool[places])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "jetmoe", "nemotron_h"])
def test_channels_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """Also where biases are added to a product after it, as in GPT-OSS."""
    model = BlockwiseModel(Checkpoint(decoders.save(name, tmp_path)), torch.device("cpu"))
    hidden = model.embed(decoders.tokens(2, 24), batch_size=2)
    with model.block(1):
        block = Block(model, 1, {}, {})
        [experts] = experts_of(block)
        ends = [matrix for expert in experts.members for matrix in (expert.first[0], expert.down)]
        [seen] = [seen.inputs.copy() for seen in observe(model, 1, hidden, inputs=ends)]
        for expert in experts.members:
            found = channels(block, expert, seen[expert.first[0].name])
            torch.testing.assert_close(found, seen[expert.down.name], rtol=1e-4, atol=1e-5)


def test_rows_are_told_from_what_is_no_longer_rows() -> None:
    source = torch.randn(5, 3)
    with Gathering() as gathering:
        three = source[torch.tensor([4, 0, 0])]
        written = source[torch.tensor([1, 2])].mul_(2)
    rows = gathering.rows(three)
    assert rows is not None
    assert rows.source is source
    assert rows.at.tolist() == [4, 0, 0]
    rows = gathering.rows(three.split([1, 2])[1])
    assert rows is not None
    assert rows.at.tolist() == [0, 0]
    for other in (written, three[:, :2], three.clone(), three.view(-1)[1:7].view(2, 3)):
        assert gathering.rows(other) is None


def test_the_record_says_what_each_saw(tmp_path: Path) -> None:
    folder = decoders.save("mixtral", tmp_path / "model")
    report = secateurs.prune(
        folder,
        output=tmp_path / "out",
        method="sparsegpt",
        calibration=decoders.tokens(6, 24),
        pattern="2:4",
        device="cpu",
    )
    assert [len(entry.tokens) for entry in report.experts] == [4, 4]
    assert all(sum(entry.tokens) == 6 * 24 * 2 for entry in report.experts)
    assert all("gate" in name for name in report.dense)
    assert not report.alone


@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
@pytest.mark.parametrize("name", ["mixtral", "llama4_text"])
def test_zeros_are_shared_out_among_experts_that_some_batches_do_not_reach(
    name: str, allocation: str, tmp_path: Path
) -> None:
    folder = decoders.save(name, tmp_path / "model")
    report = secateurs.prune(
        folder,
        output=tmp_path / "out",
        method="sparsegpt",
        allocation=allocation,
        calibration=decoders.tokens(96, 1),  # of a batch's one token at most two of four experts get it
        batch_size=1,
        device="cpu",
    )
    assert all(sum(entry.tokens) < 4 * 96 for entry in report.experts)
    blocks = secateurs.anatomy_of(decoders.config_of(name)).blocks
    weights = sum(
        out * width for block in blocks for out, width in (m.shape for m in block.matrices.values())
    )
    zeros = sum(layer.sparsity * layer.weights for layer in report.layers)  # without what stays dense
    assert zeros == pytest.approx(weights / 2, abs=0.01)
