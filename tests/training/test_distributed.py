"""Two processes train as one does: DDP by way of Trainer; sharded by FSDP2, in a loop and by the command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import COMMANDS, OPTIMIZERS, PRUNED, command, plain_loop, pruned, trainer, two_processes

import folders
from secateurs import inspect
from secateurs.training.report import TrainingReport


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def both(place: Path) -> list[dict[str, Any]]:
    return two_processes(place)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fully_sharded_parameters_train_as_in_one_process(both: list[dict[str, Any]], optimizer: str) -> None:
    losses, kept = plain_loop(0, 1, optimizer)
    for rank in both:
        assert rank[optimizer][0] == pytest.approx(losses, rel=1e-9)
        assert all(torch.equal(here, there) for here, there in zip(rank[optimizer][1], kept, strict=True))
    assert len({tuple(mask.flatten().tolist()) for mask in kept}) > 2, "the set should change in this run"


def test_ddp_through_trainer_trains_as_one_process(both: list[dict[str, Any]], tmp_path: Path) -> None:
    losses, weights = trainer(tmp_path, 1)
    for rank in both:
        assert rank["trainer"][0] == pytest.approx(losses, rel=1e-9)
        torch.testing.assert_close(rank["trainer"][1], weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", PRUNED)
def test_every_rank_prunes_alike_and_as_one_process_does(both: list[dict[str, Any]], how: str) -> None:
    shares, expected = pruned(0, 1, how)
    assert shares[-1] == pytest.approx(0.6, abs=1e-3)
    for rank in both:
        assert rank[how][0] == shares
        for here, there in zip(rank[how][1], expected, strict=True):
            if here.dtype == torch.uint8:  # a mask
                assert torch.equal(here, there)
            else:
                torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", COMMANDS)
def test_the_command_sharded_gives_the_whole_model_of_one_process(
    both: list[dict[str, Any]], place: Path, how: str
) -> None:
    """The one with zeros was stopped at step 5 and went on from step 3."""
    expected = command(place, how, 1)
    report = TrainingReport.read(place / f"{how}-2")
    assert report.steps == expected.steps == 8
    assert report.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)
    assert [entry["loss"] for entry in report.history or [] if "loss" in entry] == pytest.approx(
        [entry["loss"] for entry in expected.history or [] if "loss" in entry], rel=1e-5
    )
    here, there = folders.tensors_of(report.output), folders.tensors_of(expected.output)
    before = folders.tensors_of(place / COMMANDS[how][0])
    assert here.keys() == there.keys() == before.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(tensor == 0, there[name] == 0)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in here.items())
    assert max(layer.sparsity for layer in inspect(report.output).layers) > 0.49
