"""The shared libraries that are built where a compiler is at hand when secateurs is installed.

They are plain C behind ctypes: they depend neither on torch's headers nor on the Python version.
"""

import ctypes
import functools
import importlib.util


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """A library by the name of its extension in setup.py ("pruning._sweep"), or None if it was not built.

    Raises:
        OSError: it was built, but cannot be loaded.
    """
    found = importlib.util.find_spec(f"secateurs.{name}")
    return None if found is None or found.origin is None else ctypes.CDLL(found.origin)
