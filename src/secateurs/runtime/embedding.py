"""An embedding whose table stays packed."""

from typing import Any

import torch
from torch import Tensor, nn

from secateurs.runtime.kernels import rows
from secateurs.runtime.layout import Layout
from secateurs.runtime.linear import Packed

SCALED = {"super", "forward", "embed_scale", "to", "weight", "dtype"}
"""What the code of embeddings mentions that scale their rows: `super().forward(ids) *
self.embed_scale.to(self.weight.dtype)`, in Gemma's words and all that followed it."""


class SparseEmbedding(Packed, nn.Embedding):
    """A frozen embedding that holds its table as packed codes, and decodes the rows that are looked up.

    Made of one that is there by `hold_table`.
    """

    layout: Layout
    dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        return rows(input, self.weight, self.offsets, self.layout).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, sparsity={self.layout.sparsity:.3f}"


class ScaledSparseEmbedding(SparseEmbedding):
    """One whose rows are scaled (Gemma)."""

    embed_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.dtype)


def is_table(module: nn.Module) -> bool:
    """Whether a module looks rows of its weight up as `nn.Embedding` does, and at most scales them."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:  # which scales rows in place
        return False
    forward = type(module).forward
    names = set(forward.__code__.co_names)
    by_super = "super" in names and "weight" not in names
    return forward is nn.Embedding.forward or by_super or names == SCALED


def hold_table(module: nn.Embedding, layout: Layout) -> SparseEmbedding:
    """Make an embedding hold a packed table instead of its own.

    A class that does something to the rows (Gemma's scales them) goes on to do so.

    Args:
        module: with a table of the layout's shape; changed in place.
        layout: of codes without a mask.
    """
    held: Any = module
    dtype, kind = module.weight.dtype, type(module)
    if kind is nn.Embedding:
        held.__class__ = SparseEmbedding
    else:  # where it does not read the weight itself, its `super().forward` becomes the packed one's
        reads = "weight" in kind.forward.__code__.co_names
        bases = (ScaledSparseEmbedding, kind) if reads else (kind, SparseEmbedding)
        held.__class__ = type(f"Sparse{kind.__name__}", bases, {})
    del held.weight
    held.hold(layout)
    held.dtype = dtype
    return held
