"""Products of bfloat16 matrices with sums in float32 by products.cpp: on a CPU with AVX-512 BF16."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from secateurs.native import library


@functools.cache
def _compiled() -> Any:
    """The C function, or None."""
    try:
        loaded = library("pruning._products")
    except OSError:
        return None
    if loaded is None or not loaded.secateurs_has_products():
        return None
    pointer, i64, i32, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    function = loaded.secateurs_products
    function.argtypes = [pointer, pointer, i64, i64, pointer, i64, i64, i64, f32, f32, i32, i32]
    function.restype = None
    return function


def serves(moment: Tensor, inputs: Tensor) -> bool:
    """Whether `accumulate` can be used for them."""
    return (
        moment.device.type == inputs.device.type == "cpu"
        and (moment.dtype, inputs.dtype) == (torch.float32, torch.bfloat16)
        and _compiled() is not None
    )


def accumulate(
    moment: Tensor, targets: Tensor, inputs: Tensor, *, beta: float, alpha: float, upper: bool = False
) -> None:
    """moment = beta moment + alpha targets^T inputs.

    Args:
        moment: (out, in), float32, contiguous; modified.
        targets: (tokens, out), bfloat16.
        inputs: (tokens, in), bfloat16.
        beta: for what was summed before.
        alpha: for what is summed now.
        upper: for a symmetric result: leave out most of what lies left of the diagonal.
    """
    assert serves(moment, inputs)
    assert targets.dtype == inputs.dtype
    assert len(targets) == len(inputs)
    assert moment.is_contiguous()
    assert moment.shape == (targets.shape[1], inputs.shape[1])
    targets, inputs = (x if x.stride(1) == 1 else x.contiguous() for x in (targets, inputs))
    _compiled()(
        moment.data_ptr(),
        targets.data_ptr(),
        targets.stride(0),
        targets.shape[1],
        inputs.data_ptr(),
        inputs.stride(0),
        inputs.shape[1],
        len(inputs),
        beta,
        alpha,
        upper,
        torch.get_num_threads(),
    )
