"""Products with packed weights on the CPU: the C++ library of kernels.cpp, called through ctypes."""

import ctypes
import functools
import os

import torch
from torch import Tensor

from secateurs.native import library
from secateurs.runtime.layout import Layout

ISAS = ("portable", "neon", "avx2", "avx512", "avx512_bf16")  # by their numbers in kernels.cpp, best last
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CpuKernels:
    """The shared library of kernels.cpp.

    Args:
        loaded: the library.
        isa: the instruction set to use, one of ISAS; the machine's best if None.

    Raises:
        ValueError: the machine does not have that instruction set, or there is none of that name.
    """

    def __init__(self, loaded: ctypes.CDLL, isa: str | None = None) -> None:
        pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._linear, self._unpack = loaded.secateurs_linear, loaded.secateurs_unpack
        self._linear.argtypes = [pointer] * 6 + [i64] * 3 + [i32] * 4
        self._unpack.argtypes = [pointer] * 4 + [i64] * 3 + [i32] * 3
        self._coded_linear = loaded.secateurs_quantised_linear
        self._coded_unpack = loaded.secateurs_quantised_unpack
        self._coded_linear.argtypes = [pointer] * 7 + [i64] * 3 + [i32] * 6
        self._coded_unpack.argtypes = [pointer] * 5 + [i64] * 3 + [i32] * 6
        self._linear.restype = self._unpack.restype = None
        self._coded_linear.restype = self._coded_unpack.restype = None
        self.isas = [name for number, name in enumerate(ISAS) if loaded.secateurs_has_isa(number)]
        if isa is not None and isa not in self.isas:
            raise ValueError(f"no instruction set '{isa}' here; there are {', '.join(self.isas)}")
        self.isa = ISAS.index(isa or self.isas[-1])
        self._many_of_codes = bool(loaded.secateurs_quantised_takes_many(self.isa))
        self._many = {
            (dtype, x_dtype): bool(loaded.secateurs_takes_many(code, x_code, self.isa))
            for dtype, code in DTYPE_CODES.items()
            for x_dtype, x_code in DTYPE_CODES.items()
        }

    def takes_many(self, x_dtype: torch.dtype, layout: Layout) -> bool:
        """Whether `linear` shares an expansion between many tokens, and torch has no products of tiles."""
        return self._many_of_codes if layout.codes is not None else self._many[layout.dtype, x_dtype]

    def linear(
        self, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, layout: Layout
    ) -> Tensor:
        """x W^T + bias for x (tokens, columns), straight from the packed weight.

        Where its values are codes, x is rounded to eight bits, with a scale for each group of columns.
        """
        x = x.contiguous()
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        y = x.new_empty(x.shape[0], layout.rows)
        if layout.codes is not None:
            self._coded_linear(
                *parts_of(weight, layout),
                offsets.data_ptr(),
                None if bias is None else bias.data_ptr(),
                x.data_ptr(),
                y.data_ptr(),
                layout.rows,
                layout.columns,
                x.shape[0],
                *grid_of(layout),
                DTYPE_CODES[x.dtype],
                torch.get_num_threads(),
                self.isa,
            )
            return y
        self._linear(
            weight.data_ptr(),
            weight.data_ptr() + layout.mask_bytes,
            offsets.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            layout.rows,
            layout.columns,
            x.shape[0],
            DTYPE_CODES[layout.dtype],
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
            self.isa,
        )
        return y

    def unpack(self, weight: Tensor, offsets: Tensor, layout: Layout, first: int, last: int) -> Tensor:
        """Rows [first, last) of W, dense."""
        dense = torch.empty(last - first, layout.columns, dtype=layout.dtype)
        if layout.codes is not None:
            self._coded_unpack(
                *parts_of(weight, layout),
                offsets.data_ptr(),
                dense.data_ptr(),
                first,
                last,
                layout.columns,
                *grid_of(layout),
                DTYPE_CODES[layout.dtype],
                torch.get_num_threads(),
                self.isa,
            )
            return dense
        self._unpack(
            weight.data_ptr(),
            weight.data_ptr() + layout.mask_bytes,
            offsets.data_ptr(),
            dense.data_ptr(),
            first,
            last,
            layout.columns,
            DTYPE_CODES[layout.dtype],
            torch.get_num_threads(),
            self.isa,
        )
        return dense


def parts_of(weight: Tensor, layout: Layout) -> tuple[int | None, int, int]:
    """Where a weight's mask, codes and scales lie."""
    codes = weight.data_ptr() + layout.mask_bytes
    return weight.data_ptr() if layout.masked else None, codes, codes + layout.value_bytes


def grid_of(layout: Layout) -> tuple[int, int, bool]:
    assert layout.codes is not None
    values = layout.codes.values
    return values.bits, values.group, values.grid == "half"


@functools.cache
def cpu_kernels() -> CpuKernels | None:
    """The CPU kernels, or None where the package was installed without a compiler.

    `SECATEURS_ISA` in the environment forces one of ISAS, or `torch` to do without the library.
    """
    isa = os.environ.get("SECATEURS_ISA")
    if isa == "torch":
        return None
    loaded = library("runtime._kernels", "compressed models work, but slower than dense ones")
    return None if loaded is None else CpuKernels(loaded, isa)
