"""Two processes train by DeepSpeed's ZeRO as one does without it, through Trainer and by the command."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import command
from zero_processes import COMMANDS, STAGES, trainer, two_processes

import folders
from secateurs import inspect
from secateurs.training.report import TrainingReport

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def both(place: Path) -> list[dict[int, Any]]:
    return two_processes(place)


@pytest.mark.parametrize("stage", STAGES)
def test_trainer_by_zero_trains_as_one_process(
    both: list[dict[int, Any]], tmp_path: Path, stage: int
) -> None:
    losses, weights = trainer(tmp_path, 1, stage)
    for rank in both:
        assert rank[stage][0] == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(rank[stage][1], weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", COMMANDS)
def test_the_command_by_zero_gives_the_whole_model_of_one_process(
    both: list[dict[int, Any]], place: Path, stage: int
) -> None:
    """The first was stopped at step 5 and went on from step 3."""
    expected = command(place, "kept", 1)
    report = TrainingReport.read(place / f"kept-zero{stage}")
    assert report.steps == expected.steps == 8
    assert report.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)
    here, there = folders.tensors_of(report.output), folders.tensors_of(expected.output)
    before = folders.tensors_of(place / "gpt2")
    assert here.keys() == there.keys() == before.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(tensor == 0, there[name] == 0)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in here.items())
    assert max(layer.sparsity for layer in inspect(report.output).layers) > 0.49


@pytest.mark.parametrize("stage", COMMANDS)
def test_trained_in_bfloat16_it_gives_the_float32_values(
    both: list[dict[int, Any]], place: Path, stage: int
) -> None:
    here, there = (folders.tensors_of(place / f"kept-{how}{stage}") for how in ("low", "zero"))
    for name, tensor in here.items():
        assert tensor.dtype == torch.float32
        # Products were of eight bits, steps of a hundredth at most.
        torch.testing.assert_close(tensor, there[name], rtol=0.05, atol=0.02, msg=name)
        if tensor.ndim > 1 and "wpe" not in name:
            assert not torch.equal(tensor, tensor.bfloat16().float()), name
            assert torch.equal(tensor == 0, there[name] == 0), name
