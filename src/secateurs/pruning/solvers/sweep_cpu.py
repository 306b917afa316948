"""SparseGPT's sweep over one block of columns by sweep.cpp: float32, on the CPU.

The library is there if a compiler was when secateurs was installed (without it `sweep.sweep` does the
same, slower). It is called through ctypes.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from secateurs.native import function
from secateurs.pattern import NM, Pattern
from secateurs.pruning.solvers.sweep import choose

ISAS = ("portable", "avx2", "avx512")  # by their numbers in sweep.cpp, best last


@functools.cache
def _compiled() -> Any:
    """The C function, or None."""
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    arguments = [pointer] * 3 + [i64] * 4 + [i32] * 2
    return function(
        "pruning.solvers._sweep", "secateurs_sweep", arguments, without="SparseGPT runs in torch, slower"
    )


def serves(weight: Tensor) -> bool:
    """Whether `sweep` can be used for it."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _compiled() is not None


def sweep(weight: Tensor, inverse: Tensor, pattern: Pattern, *, isa: str = ISAS[-1]) -> None:
    """The same as `sweep.sweep`, up to rounding, on a contiguous `weight`; `isa` is the most to use."""
    columns, outputs = weight.shape
    assert serves(weight)
    assert weight.is_contiguous()
    assert (inverse.shape, inverse.dtype, inverse.device) == ((columns, columns), weight.dtype, weight.device)
    inverse = inverse.contiguous()
    if isinstance(pattern, NM):
        pattern.check_width("the weight", columns)
        n, m, keep = pattern.n, pattern.m, weight  # the mask is chosen inside; no keep is read
    else:
        n, m, keep = 0, 0, choose(weight, inverse.diagonal(), pattern).contiguous()
    _compiled()(
        weight.data_ptr(),
        inverse.data_ptr(),
        keep.data_ptr(),
        outputs,
        columns,
        n,
        m,
        torch.get_num_threads(),
        ISAS.index(isa),
    )
