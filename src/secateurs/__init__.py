"""Secateurs prunes, trains and runs sparse large language models."""

from secateurs import runtime as runtime

__version__ = "0.1.0"
