"""A model as data: its blocks, the matrices in them, and what each of those is for."""

from secateurs.anatomy.anatomy import Anatomy, anatomy_of
from secateurs.anatomy.blocks import UnsupportedArchitectureError, skeleton
from secateurs.anatomy.derive import MLP, BlockAnatomy, Heads, Role
from secateurs.anatomy.matrix import Matrix

__all__ = [
    "MLP",
    "Anatomy",
    "BlockAnatomy",
    "Heads",
    "Matrix",
    "Role",
    "UnsupportedArchitectureError",
    "anatomy_of",
    "skeleton",
]
