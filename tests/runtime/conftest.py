"""The paths that products take, and triton without a GPU."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from secateurs.runtime.cpu import cpu_kernels

BEST = cpu_kernels()
PATHS = ["torch"] if BEST is None else ["torch", *BEST.isas]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set of this machine, and the one that needs no compiler."""
    monkeypatch.setenv("SECATEURS_ISA", request.param)
    cpu_kernels.cache_clear()
    yield request.param
    monkeypatch.undo()
    cpu_kernels.cache_clear()
