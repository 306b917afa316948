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
    """A library by the name of its extension in setup.py ("pruning._sweep"), or None if it was not built.

    Raises:
        OSError: it was built, but cannot be loaded.
    """
    found = find_spec(f"secateurs.{name}")
    return None if found is None or found.origin is None else ctypes.CDLL(found.origin)


def function(name: str, symbol: str, argtypes: list[Any], restype: Any = None) -> Any:
    """A function of such a library, or None, with a warning if it was built but cannot be loaded."""
    try:
        loaded = library(name)
    except OSError as error:
        warnings.warn(f"secateurs does without '{name}', which cannot be loaded: {error}", stacklevel=2)
        return None
    if loaded is None:
        return None
    found = getattr(loaded, symbol)
    found.argtypes, found.restype = argtypes, restype
    return found
