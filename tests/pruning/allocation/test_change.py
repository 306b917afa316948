"""How far a block's result moves, against the block run before and after."""

from pathlib import Path

import pytest
import torch

import decoders
from secateurs import Sensitivity, parse_pattern
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.pruning.allocation import change
from secateurs.pruning.allocation.change import Change, relative
from secateurs.pruning.allocation.survey import Survey


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("mixtral", True),
        ("gpt_oss", True),  # biases
        ("jetmoe", True),  # all experts' tokens in one tensor
        ("llama4_text", True),  # all tokens to all experts, times the router's weight
        ("longcat_flash", True),  # a factor, and experts that compute nothing
        ("deepseek_v4", True),  # several streams, and a token that goes twice to one expert
        ("gemma4_text+moe", False),  # a norm of what experts give
    ],
)
@pytest.mark.parametrize("sequences", [1, 4])
def test_it_is_that_of_the_whole_block(name: str, short: bool, sequences: int, tmp_path: Path) -> None:
    model = BlockwiseModel(Checkpoint(decoders.save(name, tmp_path)), torch.device("cpu"))
    # In one sequence of three tokens there are experts that see none.
    batches = model.embed(decoders.tokens(sequences, 3), batch_size=2)
    generator = torch.Generator().manual_seed(0)
    unseen = 0
    with torch.no_grad(), model.block(1) as block:
        dense = [model.run(1, batch) for batch in batches]
        changed = Change(model, 1, batches)
        for matrix in model.anatomy.blocks[1].matrices.values():
            layer = f"{model.path}.1.{matrix.name}"
            weight = matrix.of(block.get_parameter(matrix.weight))
            whole = weight.clone()
            assert float(changed.of(layer).max()) < 1e-9
            weight.mul_(torch.rand(weight.shape, generator=generator) < 0.7)
            found, expected = changed.of(layer), []
            for batch, y in zip(batches, dense, strict=True):
                moved = (model.run(1, batch) - y).double().square().sum(-1)
                expected.append((moved / y.double().square().sum(-1)).flatten())
            torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-3, atol=1e-9)
            seen = bool(found.any())
            assert changed.is_short(layer) == (matrix.expert is not None and (short or not seen))
            unseen += not seen
            weight.copy_(whole)
    assert unseen or sequences > 1 or name == "deepseek_v4"


@pytest.mark.parametrize("budget", ["60%", "2:4"])
def test_allocations_are_those_of_whole_blocks(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BlockwiseModel(Checkpoint(decoders.save("mixtral", tmp_path)), torch.device("cpu"))

    def allocated() -> dict[str, float]:
        survey = Survey(model, decoders.tokens(6, 24), 2, lambda _: None)
        patterns = Sensitivity().allocate(survey, parse_pattern(budget))
        return {name: pattern.sparsity if pattern else 0.0 for name, pattern in patterns.items()}

    found = allocated()
    assert len(set(found.values())) > 1
    monkeypatch.setattr(change, "_ways", lambda *_: {})
    assert found == pytest.approx(allocated(), abs=1e-3)


def test_it_is_relative_token_by_token() -> None:
    dense = torch.tensor([[[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]])
    moved = torch.tensor([[[0.0, 0.5], [0.0, 0.05], [0.0, 0.0]]])
    assert relative(moved, dense) == pytest.approx(torch.tensor([0.01, 0.01, 0.0]))
