"""Triton's kernels compile for GPUs, also where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may take, by compute capability (CUDA C++ Programming Guide, technical
specifications)."""

REGISTERS = 65536
"""Of a multiprocessor."""


def test_every_kernel_compiles_for_ampere_and_hopper_into_registers():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("triton_kernels.py")), "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 52
    # What has no room in registers would make each of them many times slower.
    assert [kernel for kernel in kernels if kernel["stack"]] == []
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[kernel["capability"]], kernel
        assert kernel["registers"] * kernel["threads"] <= REGISTERS, kernel
