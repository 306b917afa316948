"""Runs pruned models so that their zeros pay: compressed files, and kernels that read them as they are."""

from secateurs.runtime.convert import Compression, compress, decompress
from secateurs.runtime.linear import SparseLinear
from secateurs.runtime.quantizer import SecateursConfig, SecateursQuantizer

__all__ = ["Compression", "SecateursConfig", "SecateursQuantizer", "SparseLinear", "compress", "decompress"]
