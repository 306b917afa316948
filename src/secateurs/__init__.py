"""Secateurs prunes, trains and runs sparse large language models."""

__version__ = "0.1.0"
