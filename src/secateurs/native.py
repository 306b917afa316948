"""The shared libraries that are built where a compiler is at hand when secateurs is installed.

They are plain C behind ctypes: they depend neither on torch's headers nor on the Python version.
"""

import ctypes
import functools
import warnings
from importlib.util import find_spec
from typing import Any


@functools.cache
def library(name: str, without: str) -> ctypes.CDLL | None:
    """A library, or None, with one warning, if it was not built or cannot be loaded.

    Args:
        name: of its extension in setup.py, such as "pruning.solvers._sweep".
        without: what the warning says of doing without.
    """
    found = find_spec(f"secateurs.{name}")
    if found is None or found.origin is None:
        reason = "there was no C++ compiler when secateurs was installed: install one, and secateurs again"
    else:
        try:
            return ctypes.CDLL(found.origin)
        except OSError as error:
            reason = str(error)
    warnings.warn(f"{without} ({reason})", stacklevel=2)
    return None


def function(name: str, symbol: str, argtypes: list[Any], restype: Any = None, *, without: str) -> Any:
    """A function of such a library, or None."""
    loaded = library(name, without)
    if loaded is None:
        return None
    found = getattr(loaded, symbol)
    found.argtypes, found.restype = argtypes, restype
    return found
