"""Sparse training on a GPU as on the CPU; skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW

import secateurs
from families import build, tokens
from secateurs.demo import CALIBRATION, MODEL
from secateurs.training.ladder import Ladder
from secateurs.training.sparse import SparseTraining

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

STEPS = 12


def trained(device: str, *, autocast: bool = False, **settings: Any) -> tuple[list[float], SparseTraining]:
    """Losses of a run that climbs down a ladder, and what ran it."""
    model = build("llama").to(device).train()
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    sat = SparseTraining(schedule=Ladder(0.5, STEPS), probe_every=3, **settings)
    sat.attach(model, optimizer, total_steps=STEPS)
    losses = []
    for step in range(STEPS):
        ids = tokens(4, seed=step).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sat.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    sat.detach()
    return losses, sat


@pytest.mark.parametrize("importance", ["weighted", "taylor"])
def test_the_same_losses_as_on_the_cpu(importance: str) -> None:
    found, there = trained("cuda", importance=importance)
    expected, here = trained("cpu", importance=importance)
    assert found == pytest.approx(expected, rel=1e-3)
    assert there.flops_done == here.flops_done


def test_under_autocast() -> None:
    found, _ = trained("cuda", autocast=True)
    expected, _ = trained("cpu")
    assert found == pytest.approx(expected, rel=0.05)


def test_a_pruned_model_keeps_its_zeros(tmp_path: Path) -> None:
    secateurs.prune(MODEL, output=tmp_path / "pruned", method="magnitude", pattern="70%", device="cuda")
    secateurs.train(
        tmp_path / "pruned",
        output=tmp_path / "trained",
        text=CALIBRATION,
        steps=6,
        length=64,
        batch_size=2,
        device="cuda",
    )
    before, after = (
        {name: t for file in (tmp_path / folder).glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in ("pruned", "trained")
    )
    moved = [name for name, weight in before.items() if not torch.equal(after[name], weight)]
    assert len(moved) > 0
    for name, weight in before.items():
        if "_proj" in name:
            assert (after[name][weight == 0] == 0).all()
