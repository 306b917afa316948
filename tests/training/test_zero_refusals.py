"""Optimisers of DeepSpeed that would get past what holds weights; none of it needs DeepSpeed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateurs.training.zero import stepping, zero_of


class Outer(SimpleNamespace):
    """As DeepSpeed's optimiser looks from outside."""


Outer.__module__ = "deepspeed.runtime.zero.stage3"


def adam() -> torch.optim.Optimizer:
    return torch.optim.Adam([torch.zeros(3, requires_grad=True)])


@pytest.mark.parametrize(
    ("has", "message"),
    [
        ({}, "is not by ZeRO"),
        ({"fp32_partitioned_groups_flat": [], "swap_optimizer": True}, "on disk"),
        ({"fp32_partitioned_groups_flat": [], "backup_optimizer": object()}, "several optimisers"),
        ({"_link_all_hp_params": None, "zenflow": True}, "several optimisers"),
    ],
)
def test_what_steps_elsewhere_is_refused(has: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero_of(SimpleNamespace(optimizer=Outer(optimizer=adam(), **has)))


def test_the_optimiser_that_steps_is_found_in_its_wrappings() -> None:
    inner = adam()
    outer = Outer(optimizer=inner, fp32_partitioned_groups_flat=[])
    assert zero_of(SimpleNamespace(optimizer=outer)) is outer
    assert stepping(SimpleNamespace(optimizer=outer)) is stepping(outer) is inner
    # Without DeepSpeed accelerate's wrapping is the only one: what another optimiser wraps is its own affair.
    wrapper = SimpleNamespace(optimizer=inner)
    assert stepping(SimpleNamespace(optimizer=wrapper)) is wrapper
    assert stepping(inner) is inner
    assert zero_of(inner) is None
