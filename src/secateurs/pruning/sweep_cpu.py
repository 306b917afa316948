"""SparseGPT's sweep over one block of columns by sweep.cpp: float32, on the CPU.

The library is there if a compiler was when secateurs was installed. It is called through ctypes.
"""

import ctypes
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from secateurs.pattern import NM, Pattern
from secateurs.pruning.sparsegpt import choose


@functools.cache
def _library() -> Any:
    """The C function, or None."""
    found = importlib.util.find_spec("secateurs.pruning._sweep")
    if found is None or found.origin is None:
        return None
    try:
        function = ctypes.CDLL(found.origin).secateurs_sweep
    except OSError:
        return None
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4 + [ctypes.c_int32]
    function.restype = None
    return function


def serves(weight: Tensor) -> bool:
    """Whether `sweep` can be used for it."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _library() is not None


def sweep(weight: Tensor, inverse: Tensor, pattern: Pattern) -> None:
    """The same as `sparsegpt.sweep`, up to rounding, on a contiguous `weight`."""
    assert serves(weight)
    assert weight.is_contiguous()
    columns, outputs = weight.shape
    inverse = inverse.contiguous()
    if isinstance(pattern, NM):
        n, m, keep = pattern.n, pattern.m, weight  # the mask is chosen inside; no keep is read
    else:
        n, m, keep = 0, 0, choose(weight, inverse.diagonal(), pattern).to(weight.dtype).contiguous()
    pointers = (tensor.data_ptr() for tensor in (weight, inverse, keep))
    _library()(*pointers, outputs, columns, n, m, torch.get_num_threads())
