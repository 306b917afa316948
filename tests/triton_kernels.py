"""Compiles every Triton kernel for GPUs that need not be here: run by test_triton_compiles.py, and by
benchmarks/triton_resources.py.

A process of its own, because where there is no GPU the tests' has kernels that Triton interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import bfloat16, float16, float32

from secateurs.pruning.solvers import sweep_triton
from secateurs.runtime import gpu

NAMES = {float32: "fp32", float16: "fp16", bfloat16: "bf16"}
PACKED = {"mask": "*i32", "offsets": "*i32", "scales": "*u8", "rows": "i32", "columns": "i32"}
GRIDS = [(0, True), (8, True), (4, True), (4, False), (3, True), (2, False)]
"""Bits, and whether there is a mask."""


def compiled(kernel, pointers, constants, capability, warps=4):
    """For arguments that are aligned, as the large ones are."""
    signature = {
        name: "constexpr" if name in constants else (PACKED | pointers).get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("rows", "columns", "outputs")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def of_a_tile(tile):
    return {"ROWS": tile.rows, "BLOCK": tile.columns, "STAGES": tile.stages}


def kernels(capability):
    """Every kernel as it is launched: its name, and what was compiled."""
    for (factor, name), (bits, masked) in product(NAMES.items(), GRIDS):
        if bits and factor != bfloat16:  # they differ in how a weight is rounded at last
            continue
        form = {"BITS": bits, "GROUP": 64, "LOWEST": -8, "STEP": 1, "MASKED": masked, "DTYPE": factor}
        values = {"values": "*u8" if bits else f"*{name}"}
        kind = f"{name}, {bits} bits{'' if masked else ' without a mask'}" if bits else name
        data = dict.fromkeys(("x", "bias", "y"), f"*{name}") | values
        together = gpu.TOGETHER_FLOAT32 if factor == float32 else gpu.TOGETHER
        if not bits:
            constants = {"HAS_BIAS": True, "ROWS": gpu.VECTOR.rows, "WORDS": gpu.VECTOR.columns // 32}
            constants |= {"STAGES": gpu.VECTOR.stages}
            made = compiled(gpu._vector_kernel, data, constants, capability, gpu.VECTOR.warps)
            yield f"linear, 1 tokens, {kind}", made
        for tokens, tile in ((1, gpu.ALONE), (16, together))[not bits :]:
            constants = {"HAS_BIAS": True, "FACTOR": factor, "TOKENS": tokens} | form | of_a_tile(tile)
            made = compiled(gpu._linear_kernel, data, constants, capability, tile.warps)
            yield f"linear, {tokens} tokens, {kind}", made
        data = {"dense": f"*{name}"} | values
        constants = form | of_a_tile(gpu.EXPANSION)
        made = compiled(gpu._expand_kernel, data, constants, capability, gpu.EXPANSION.warps)
        yield f"expand, {kind}", made
    for m in (0, 4):
        data = dict.fromkeys(("weight", "inverse", "keep"), "*fp32")
        constants = {"M": m, "WIDTH": 128, "ROWS": sweep_triton.TILE // 128}
        yield f"sweep, groups of {m}", compiled(sweep_triton._sweep, data, constants, capability)


def resources(made):
    """What a compiled kernel takes: registers and bytes of the stack (registers that did not suffice) of each
    thread, bytes of shared memory of each program, and instructions of a turn of its longest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        used = _told("cuobjdump", "--dump-resource-usage", file.name)
        code = _told("nvdisasm", "-c", file.name)
    found = {key: int(re.search(rf"{key.upper()}:(\d+)", used)[1]) for key in ("reg", "stack")}
    return {
        "registers": found["reg"],
        "stack": found["stack"],
        "shared": made.metadata.shared,
        "threads": 32 * made.metadata.num_warps,
        "loop_instructions": _loop(code),
    }


def _told(tool, *arguments):
    """By a tool that Triton brings along."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _loop(code):
    """Instructions between a branch back and where it goes to, at the most; 0 where there is none."""
    labels, number, longest = {}, 0, 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = number
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s", line):
            number += 1
            branch = re.search(r"BRA.*?(\.L_x_\d+)", line)
            if branch and branch[1] in labels:
                longest = max(longest, number - labels[branch[1]])
    return longest


if __name__ == "__main__":
    for target in map(int, sys.argv[1:]):
        for described, made in kernels(target):
            print(json.dumps({"capability": target, "kernel": described} | resources(made)), flush=True)
