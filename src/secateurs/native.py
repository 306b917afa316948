"""The shared libraries that are built where a compiler is at hand when secateurs is installed.

They are plain C behind ctypes: they depend neither on torch's headers nor on the Python version.
"""

import ctypes
import functools
import warnings
from importlib.util import find_spec
from typing import Any


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """A library by the name of its extension in setup.py ("pruning._sweep"); or None, with one warning."""
    found = find_spec(f"secateurs.{name}")
    reason = "there was no C++ compiler when it was installed"
    if found is not None and found.origin is not None:
        try:
            return ctypes.CDLL(found.origin)
        except OSError as error:
            reason = str(error)
    warnings.warn(
        f"secateurs does without '{name}' ({reason}): torch does the same, slower. Install a C++ compiler "
        "and reinstall secateurs.",
        stacklevel=2,
    )
    return None


def function(name: str, symbol: str, argtypes: list[Any], restype: Any = None) -> Any:
    """A function of such a library, or None."""
    loaded = library(name)
    if loaded is None:
        return None
    found = getattr(loaded, symbol)
    found.argtypes, found.restype = argtypes, restype
    return found
