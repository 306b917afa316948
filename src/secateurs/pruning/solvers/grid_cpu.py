"""A group of columns on a grid by sweep.cpp: float32, on the CPU. See `sweep_cpu`."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from secateurs.native import function
from secateurs.pruning.solvers.grid import REFITS, trials
from secateurs.pruning.solvers.sweep_cpu import ISAS
from secateurs.values import Values


@functools.cache
def _compiled() -> tuple[Any, Any] | None:
    """The C functions, or None."""
    pointer, i64, i32, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    end = [i64] * 2 + [f32] * 3 + [i32] * 2
    without = "rounding runs in torch, slower"
    library = "pruning.solvers._sweep"
    scales = function(library, "secateurs_scales", [*[pointer] * 5, i64, i64, *end], without=without)
    settle = function(library, "secateurs_settle", [*[pointer] * 5, *end], without=without)
    return None if scales is None else (scales, settle)


def serves(weight: Tensor) -> bool:
    """Whether the functions below can be used for it."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _compiled() is not None


def choose_scales(
    weight: Tensor, keep: Tensor, importance: Tensor, values: Values, *, isa: str = ISAS[-1]
) -> Tensor:
    """The same as `grid.choose_scales`, up to rounding; `isa` is the most to use."""
    compiled = _compiled()
    assert compiled is not None
    _check(weight, keep, importance)
    scale, tried = torch.empty_like(weight[0]), torch.tensor(trials(values), dtype=torch.float32)
    columns, outputs = weight.shape
    compiled[0](
        *(tensor.data_ptr() for tensor in (weight, keep, importance, scale, tried)),
        *(len(tried), REFITS, outputs, columns),
        *_end(values, isa),
    )
    return scale


def settle(
    weight: Tensor,
    before: Tensor | None,
    keep: Tensor,
    scale: Tensor,
    push: Tensor,
    values: Values,
    *,
    isa: str = ISAS[-1],
) -> None:
    """The same as `grid.settle`, up to rounding, on a contiguous `weight`."""
    compiled = _compiled()
    assert compiled is not None
    push = push.contiguous()
    _check(weight, keep, scale, push, *(() if before is None else (before,)))
    columns, outputs = weight.shape
    compiled[1](
        weight.data_ptr(),
        None if before is None else before.data_ptr(),
        *(tensor.data_ptr() for tensor in (keep, scale, push)),
        *(outputs, columns),
        *_end(values, isa),
    )


def _end(values: Values, isa: str) -> tuple[float, float, float, int, int]:
    grid = float(values.lowest), float(values.step), float(2**values.bits - 1)
    return *grid, torch.get_num_threads(), ISAS.index(isa)


def _check(weight: Tensor, keep: Tensor, *others: Tensor) -> None:
    assert serves(weight)
    assert keep.dtype == torch.bool
    assert all(tensor.is_contiguous() for tensor in (weight, keep, *others))
    assert all(tensor.dtype == torch.float32 for tensor in others)
