"""Where a family of models keeps its blocks, attention heads and MLP channels."""

from secateurs.anatomy.families import (
    FAMILIES,
    Family,
    Projection,
    Role,
    Sizes,
    UnsupportedArchitectureError,
    family_of,
    linear_weight,
)

__all__ = [
    "FAMILIES",
    "Family",
    "Projection",
    "Role",
    "Sizes",
    "UnsupportedArchitectureError",
    "family_of",
    "linear_weight",
]
