"""Two processes train as one does: DDP by way of Trainer, and parameters sharded by FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import OPTIMIZERS, PRUNED, plain_loop, pruned, trainer, two_processes


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_processes(tmp_path_factory.mktemp("ranks"))


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
