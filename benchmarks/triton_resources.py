"""What every Triton kernel takes of a GPU, compiled for Ampere and Hopper where there is none: registers,
what spills from them, shared memory, and how many programs a multiprocessor holds by these.

    python benchmarks/triton_resources.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from common import HERE, RESULTS, Record, arguments, environment, print_table, save

TARGETS = (80, 90)
REGISTERS, SHARED, THREADS, PROGRAMS = 65536, {80: 164 * 1024, 90: 228 * 1024}, 2048, 32
"""Of a multiprocessor (CUDA C++ Programming Guide, technical specifications)."""

OF_A_PROGRAM = 1024
"""Bytes of shared memory that the system takes for each."""


def programs(kernel: Record) -> int:
    """That a multiprocessor holds at once."""
    registers = -(-kernel["registers"] // 8) * 8 * kernel["threads"]
    shared = kernel["shared"] + OF_A_PROGRAM
    fitting = (REGISTERS // registers, SHARED[kernel["capability"]] // shared, THREADS // kernel["threads"])
    return min(*fitting, PROGRAMS)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "triton_resources.json")
    settings = parser.parse_args()
    script = HERE.parent / "tests" / "triton_kernels.py"
    command = [sys.executable, str(script), *map(str, TARGETS)]
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=plain)
    rows: list[Record] = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [row | {"programs": programs(row)} for row in rows]
    save(settings.results, environment(), rows)
    names = [
        "capability",
        "kernel",
        "registers",
        "stack",
        "shared",
        "threads",
        "programs",
        "loop_instructions",
    ]
    print_table(names, [[row[name] for name in names] for row in rows])


if __name__ == "__main__":
    main()
