"""The version, where both the package and its records can import it."""

__version__ = "0.1.0"
