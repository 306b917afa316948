"""Builds the CPU kernels; everything else is in pyproject.toml.

The kernels are optional: where there is no compiler the package installs without them. They are a plain
shared library behind ctypes, so they depend neither on torch's headers nor on the Python version: one wheel
serves all versions. Which instruction set they use is chosen when they run.
"""

import sys

from setuptools import Extension, setup

FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-w"]

# How activations are rounded must not depend on the instruction set.
EXACT = {"runtime._kernels": ["-ffp-contract=off"]}

openmp = ["-fopenmp"] if sys.platform == "linux" else []

setup(
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    ext_modules=[
        Extension(
            f"secateurs.{name}",
            [f"src/secateurs/{source}" for source in sources],
            depends=["src/secateurs/runtime/kernels.h"],
            extra_compile_args=[*FLAGS, *openmp, *EXACT.get(name, [])],
            extra_link_args=openmp,
            language="c++",
            optional=True,
            py_limited_api=True,
        )
        for name, *sources in (
            ("pruning.solvers._products", "pruning/solvers/products.cpp"),
            ("pruning.solvers._sweep", "pruning/solvers/sweep.cpp"),
            ("runtime._kernels", "runtime/kernels.cpp", "runtime/quantised.cpp", "runtime/step.cpp"),
        )
    ],
)
