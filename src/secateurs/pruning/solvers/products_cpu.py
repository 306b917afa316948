"""Products of bfloat16 matrices with sums in float32 by products.cpp: on a CPU with AVX-512 BF16."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from secateurs.device import multiplies_bfloat16
from secateurs.native import function


@functools.cache
def _compiled() -> tuple[Any, Any] | None:
    """The C functions that multiply and that say what scratch that takes, or None if this machine cannot."""
    if not multiplies_bfloat16(torch.device("cpu")):
        return None
    pointer, i64, i32, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    matrix = [pointer, i64, i64]
    arguments = [pointer, *matrix, *matrix, i64, f32, f32, i32, pointer, i32]
    without = "bfloat16 models are pruned with sums by torch, slower"
    products = function("pruning.solvers._products", "secateurs_products", arguments, without=without)
    scratch = function(
        "pruning.solvers._products", "secateurs_products_scratch", [i64, i64], i64, without=without
    )
    return (products, scratch) if scratch and scratch(1, 1) else None


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
        targets: (tokens, out), bfloat16; one token at least.
        inputs: (tokens, in), bfloat16.
        beta: for what was summed before; at 0 that is not read.
        alpha: for what is summed now.
        upper: for a symmetric result: leave out most of what lies left of the diagonal.
    """
    assert serves(moment, inputs)
    assert (targets.dtype, targets.device) == (inputs.dtype, inputs.device)
    assert targets.ndim == inputs.ndim == 2
    assert len(targets) == len(inputs) > 0
    assert moment.shape == (targets.shape[1], inputs.shape[1])
    assert moment.is_contiguous()
    compiled = _compiled()
    assert compiled is not None
    products, scratch = compiled
    targets, inputs = (x if x.stride(1) == 1 else x.contiguous() for x in (targets, inputs))
    space = torch.empty(scratch(*moment.shape), dtype=torch.int32)
    products(
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
        space.data_ptr(),
        torch.get_num_threads(),
    )
