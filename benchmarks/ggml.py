"""ggml's product of a quantised matrix with one token or a few, through ctypes: llama.cpp's, as a rival.

It takes a folder with libggml-base.so and libggml-cpu.so, built natively from ggml's source:

    cmake -S ggml -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build
"""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "IQ4_NL": 20}
"""By ggml's numbers."""


class _Parameters(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


class Ggml:
    """The library.

    Args:
        folder: holds it.
        threads: to multiply with.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._base, self._cpu = (
            ctypes.CDLL(str(folder / f"libggml-{name}.so"), mode=ctypes.RTLD_GLOBAL)
            for name in ("base", "cpu")
        )
        for library, name, result, arguments in (
            (self._base, "ggml_init", c_void_p, [_Parameters]),
            (self._base, "ggml_new_tensor_2d", c_void_p, [c_void_p, c_int, c_int64, c_int64]),
            (self._base, "ggml_mul_mat", c_void_p, [c_void_p] * 3),
            (self._base, "ggml_new_graph", c_void_p, [c_void_p]),
            (self._base, "ggml_build_forward_expand", None, [c_void_p] * 2),
            (self._base, "ggml_row_size", c_size_t, [c_int, c_int64]),
            (
                self._base,
                "ggml_quantize_chunk",
                c_size_t,
                [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
            ),
            (self._base, "ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, [c_void_p] * 2),
            (self._base, "ggml_backend_alloc_ctx_tensors", c_void_p, [c_void_p] * 2),
            (self._base, "ggml_backend_tensor_set", None, [c_void_p, c_void_p, c_size_t, c_size_t]),
            (self._base, "ggml_backend_tensor_get", None, [c_void_p, c_void_p, c_size_t, c_size_t]),
            (self._base, "ggml_backend_graph_compute", c_int, [c_void_p] * 2),
            (self._base, "ggml_backend_cpu_buffer_type", c_void_p, []),
            (self._base, "ggml_backend_get_device", c_void_p, [c_void_p]),
            (self._base, "ggml_backend_dev_backend_reg", c_void_p, [c_void_p]),
            (self._base, "ggml_backend_reg_get_proc_address", c_void_p, [c_void_p, c_char_p]),
            (self._base, "ggml_backend_buft_name", c_char_p, [c_void_p]),
            (self._base, "ggml_backend_supports_op", c_bool, [c_void_p] * 2),
            (self._cpu, "ggml_backend_cpu_init", c_void_p, []),
            (self._cpu, "ggml_backend_cpu_set_n_threads", None, [c_void_p, c_int]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._backend = self._cpu.ggml_backend_cpu_init()
        self._cpu.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def _repacked(self) -> int | None:
        """The kind of buffer in which weights are rearranged for this CPU."""
        device = self._base.ggml_backend_get_device(self._backend)
        address = self._base.ggml_backend_reg_get_proc_address(
            self._base.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
        )
        kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        for i in range(16):
            if not kinds[i]:
                return None
            if self._base.ggml_backend_buft_name(kinds[i]) == b"CPU_REPACK":
                return int(kinds[i])
        return None

    def product(
        self, kind: str, weight: np.ndarray, x: np.ndarray, *, repacked: bool, copies: int
    ) -> tuple[list["Product"], int] | None:
        """Products of copies of one matrix with x, and the bytes of each; None if there is no such buffer.

        Args:
            kind: one of TYPES.
            weight: (rows, columns) float32.
            x: (tokens, columns) float32.
            repacked: whether weights are rearranged.
            copies: how many.
        """
        rows, columns = weight.shape
        size = self._base.ggml_row_size(TYPES[kind], columns) * rows
        data = np.empty(size, np.uint8)
        self._base.ggml_quantize_chunk(
            TYPES[kind], weight.ctypes.data, data.ctypes.data, 0, rows, columns, None
        )
        buffer = self._repacked() if repacked else self._base.ggml_backend_cpu_buffer_type()
        if buffer is None:
            return None
        made = []
        for _ in range(copies):
            weights = self._base.ggml_init(_Parameters(1 << 16, None, True))
            w = self._base.ggml_new_tensor_2d(weights, TYPES[kind], columns, rows)
            if not self._base.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffer):
                return None
            self._base.ggml_backend_tensor_set(w, data.ctypes.data, 0, size)
            context = self._base.ggml_init(_Parameters(1 << 20, None, True))
            tokens = self._base.ggml_new_tensor_2d(context, TYPES["F32"], columns, len(x))
            y = self._base.ggml_mul_mat(context, w, tokens)
            graph = self._base.ggml_new_graph(context)
            self._base.ggml_build_forward_expand(graph, y)
            self._base.ggml_backend_alloc_ctx_tensors(context, self._backend)
            self._base.ggml_backend_tensor_set(tokens, x.ctypes.data, 0, x.nbytes)
            if not self._base.ggml_backend_supports_op(self._backend, y):
                return None
            made.append(Product(self, graph, y, (len(x), rows)))
        return made, size


class Product:
    """One product, ready to run."""

    def __init__(self, ggml: Ggml, graph: int, y: int, shape: tuple[int, int]) -> None:
        self._ggml, self._graph, self._y, self._shape = ggml, graph, y, shape

    def __call__(self) -> None:
        self._ggml._base.ggml_backend_graph_compute(self._ggml._backend, self._graph)

    def result(self) -> np.ndarray:
        """(tokens, rows), after a run."""
        y = np.empty(self._shape, np.float32)
        self._ggml._base.ggml_backend_tensor_get(self._y, y.ctypes.data, 0, y.nbytes)
        return y
