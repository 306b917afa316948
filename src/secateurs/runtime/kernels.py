"""Products with packed weights as torch operators, on the fastest path that the machine has.

On the CPU, C++ kernels multiply straight from the packed form; on CUDA, Triton kernels do. Where that does
not pay for many tokens, which are a matter of arithmetic instead of bytes, the weight is expanded a panel at
a time and multiplied by torch. Everything is an operator of its own with a fake and an input gradient, so
torch.compile, and adapters trained on top, see one opaque linear.
"""

import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from secateurs.runtime.cpu import DTYPE_CODES, CpuKernels, cpu_kernels
from secateurs.runtime.format import unpack
from secateurs.runtime.layout import TAIL_BYTES, Codes, Layout
from secateurs.values import Values

# More tokens than this go through expansion on the CPU, so many bytes of expanded weight at a time that they
# stay in the cache for the product. benchmarks/prefill_cpu.py measures both: the faster torch multiplies, the
# sooner expansion pays. Where kernels take many, it is STRIPS for values, and for codes it never pays.
DIRECT_TOKENS = {torch.float32: 48, torch.bfloat16: 12, torch.float16: 48}
DIRECT_TOKENS_OF_CODES = {torch.float32: 128, torch.bfloat16: 64, torch.float16: 128}
STRIPS = 512
PANEL_BYTES = 4 << 20
ROWS_AT_ONCE = 4096


def direct_tokens(dtype: torch.dtype, layout: Layout, kernels: CpuKernels) -> int:
    """How many tokens of a dtype are multiplied straight from a packed weight on the CPU."""
    if kernels.takes_many(dtype, layout):
        return STRIPS if layout.codes is None else sys.maxsize
    return (DIRECT_TOKENS if layout.codes is None else DIRECT_TOKENS_OF_CODES)[dtype]


def expand(weight: Tensor, offsets: Tensor, layout: Layout, first: int, last: int) -> Tensor:
    """Rows [first, last) of a packed weight, dense, on its device."""
    if weight.device.type == "cpu" and (kernels := cpu_kernels()) is not None:
        return kernels.unpack(weight, offsets, layout, first, last)
    if weight.is_cuda:
        from secateurs.runtime import gpu

        return gpu.expand(weight, offsets, layout, first, last)
    return unpack(weight, layout)[first:last]


def _layout(weight: Tensor, offsets: Tensor, columns: int, dtype: torch.dtype, *codes: Any) -> Layout:
    """The layout, whose sizes follow from those of the tensors. With codes it does not count non-zeros."""
    layout = _layout_of(len(weight), len(offsets) - 1, columns, dtype, *codes)
    assert (weight.shape, weight.dtype, offsets.dtype) == ((layout.bytes,), torch.uint8, torch.int32)
    assert weight.device == offsets.device
    assert weight.is_contiguous()
    assert offsets.is_contiguous()
    return layout


@lru_cache(maxsize=1 << 16)  # made anew it would take a third of a small layer's time, for each token
def _layout_of(
    size: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    bits: int = 0,
    group: int = 0,
    half: bool = False,
    masked: bool = True,
) -> Layout:
    codes = Codes(Values(bits, group, "half" if half else "whole"), masked, 0) if bits else None  # type: ignore[arg-type]
    layout = Layout(rows, columns, 0, dtype, codes)
    rest = size - layout.bytes
    if codes is None:
        return replace(layout, nonzeros=rest // dtype.itemsize)
    return replace(layout, codes=replace(codes, bytes=rest))


def _panels(weight: Tensor, layout: Layout) -> list[tuple[int, int]]:
    """Ranges of rows to expand at a time: all at once where the reference unpacks all rows anyway."""
    step = layout.rows
    if weight.device.type == "cpu" and cpu_kernels() is not None:
        step = max(1, PANEL_BYTES // (layout.columns * layout.dtype.itemsize))
    return [(first, min(first + step, layout.rows)) for first in range(0, layout.rows, step)]


def _linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    columns: int,
    dtype: torch.dtype,
    *codes: Any,
) -> Tensor:
    layout = _layout(weight, offsets, columns, dtype, *codes)
    assert x.shape[-1] == columns
    assert x.device == weight.device
    tokens = x.reshape(-1, columns)
    shape = (*x.shape[:-1], layout.rows)
    if weight.is_cuda and x.dtype in DTYPE_CODES:
        from secateurs.runtime import gpu

        if len(tokens) <= gpu.DIRECT_TOKENS:
            return _shaped(gpu.linear(tokens, weight, offsets, bias, layout), shape)
    elif weight.device.type == "cpu" and x.dtype in DTYPE_CODES:
        kernels = cpu_kernels()
        if kernels is not None and len(tokens) <= direct_tokens(x.dtype, layout, kernels):
            return _shaped(kernels.linear(tokens, weight, offsets, bias, layout), shape)
    wide = torch.promote_types(x.dtype, dtype)
    tokens = tokens.to(wide)
    y = x.new_empty(len(tokens), layout.rows)
    for first, last in _panels(weight, layout):
        part = expand(weight, offsets, layout, first, last).to(wide)
        shift = None if bias is None else bias[first:last].to(wide)
        y[:, first:last] = torch.nn.functional.linear(tokens, part, shift)
    return _shaped(y, shape)


def _shaped(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view that autograd does not take for one: some models (Falcon) add to a layer's output in place."""
    shaped: Tensor = torch.ops.aten._unsafe_view(y, shape)
    return shaped


def _input_gradient(
    gradient: Tensor, weight: Tensor, offsets: Tensor, columns: int, dtype: torch.dtype, *codes: Any
) -> Tensor:
    layout = _layout(weight, offsets, columns, dtype, *codes)
    wide = torch.promote_types(gradient.dtype, dtype)
    tokens = gradient.reshape(-1, layout.rows).to(wide)
    total = tokens.new_zeros(len(tokens), columns, dtype=torch.promote_types(wide, torch.float32))
    for first, last in _panels(weight, layout):
        part = expand(weight, offsets, layout, first, last).to(wide)
        total += tokens[:, first:last] @ part
    return total.to(gradient.dtype).view(*gradient.shape[:-1], columns)


def _rows(
    index: Tensor, weight: Tensor, offsets: Tensor, columns: int, dtype: torch.dtype, *form: Any
) -> Tensor:
    layout = _layout(weight, offsets, columns, dtype, *form)
    assert layout.codes is not None
    codes, scales, tail = weight.split([layout.value_bytes, layout.scale_bytes, TAIL_BYTES])
    found = []
    for some in index.flatten().split(ROWS_AT_ONCE):
        parts = [each.view(layout.rows, -1).index_select(0, some) for each in (codes, scales)]
        part = replace(layout, rows=len(some), codes=replace(layout.codes, bytes=parts[0].numel()))
        ends = torch.arange(len(some) + 1, dtype=torch.int32, device=weight.device) * parts[0].shape[1]
        packed = torch.cat([parts[0].flatten(), parts[1].flatten(), tail])
        found.append(expand(packed, ends, part, 0, part.rows))
    return torch.cat(found).view(*index.shape, columns)


torch.library.define(
    "secateurs::linear",
    "(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, int columns, ScalarType dtype, int bits=0, "
    "int group=0, bool half=False, bool masked=True) -> Tensor",
)
torch.library.define(
    "secateurs::input_gradient",
    "(Tensor gradient, Tensor weight, Tensor offsets, int columns, ScalarType dtype, int bits=0, "
    "int group=0, bool half=False, bool masked=True) -> Tensor",
)
torch.library.define(
    "secateurs::rows",
    "(Tensor index, Tensor weight, Tensor offsets, int columns, ScalarType dtype, int bits, int group, "
    "bool half, bool masked) -> Tensor",
)
torch.library.impl("secateurs::rows", "CompositeExplicitAutograd", _rows)
torch.library.impl("secateurs::linear", "CompositeExplicitAutograd", _linear)
torch.library.impl("secateurs::input_gradient", "CompositeExplicitAutograd", _input_gradient)


@torch.library.register_fake("secateurs::linear")
def _fake_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, columns: int, *form: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], offsets.shape[0] - 1)


@torch.library.register_fake("secateurs::rows")
def _fake_rows(
    index: Tensor, weight: Tensor, offsets: Tensor, columns: int, dtype: torch.dtype, *form: Any
) -> Tensor:
    return weight.new_empty(*index.shape, columns, dtype=dtype)


@torch.library.register_fake("secateurs::input_gradient")
def _fake_input_gradient(
    gradient: Tensor, weight: Tensor, offsets: Tensor, columns: int, *form: Any
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], columns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, offsets, _, *ctx.form = inputs
    ctx.save_for_backward(weight, offsets)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, offsets = ctx.saved_tensors
    x_gradient = bias_gradient = None
    if ctx.needs_input_grad[0]:
        x_gradient = torch.ops.secateurs.input_gradient(gradient, weight, offsets, *ctx.form)
    if ctx.needs_input_grad[3]:
        bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return x_gradient, None, None, bias_gradient, *[None] * len(ctx.form)


torch.library.register_autograd("secateurs::linear", _backward, setup_context=_save)


def sparse_linear(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """x W^T + bias, for a packed W that is not trained; differentiable in x and bias.

    Args:
        x: (..., columns), float; the result has its dtype, and sums are in float32 at least.
        weight: (layout.bytes,) uint8, packed by `pack`.
        offsets: (rows + 1,) int32, by `row_offsets`: they are trusted.
        bias: (rows,) or None.
        layout: of the weight.

    Returns:
        (..., rows).
    """
    return torch.ops.secateurs.linear(x, weight, offsets, bias, layout.columns, layout.dtype, *_form(layout))


def rows(index: Tensor, weight: Tensor, offsets: Tensor, layout: Layout) -> Tensor:
    """Rows of a packed W, dense; W is not trained.

    Args:
        index: (...), int32 or int64: which.
        weight: (layout.bytes,) uint8, packed by `pack`: codes without a mask.
        offsets: (rows + 1,) int32, by `row_offsets`.
        layout: of the weight.

    Returns:
        (..., columns), in the layout's dtype.

    Raises:
        IndexError: there is no such row.
    """
    return torch.ops.secateurs.rows(index, weight, offsets, layout.columns, layout.dtype, *_form(layout))


def _form(layout: Layout) -> tuple[Any, ...]:
    """What `_layout` is told of codes."""
    if layout.codes is None:
        return ()
    values = layout.codes.values
    return values.bits, values.group, values.grid == "half", layout.codes.masked
