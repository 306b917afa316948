"""Triton's kernels compile for GPUs, also where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_kernel_compiles_for_ampere_and_hopper_into_registers():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("triton_kernels.py")), "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = done.stdout.splitlines()
    assert len(kernels) == 52
    # What has no room in registers would make each of them many times slower.
    assert [kernel for kernel in kernels if not kernel.endswith(" 0")] == []
