"""An embedding whose table stays packed."""

from typing import Any

import torch
from torch import Tensor, nn

from secateurs.runtime.kernels import rows
from secateurs.runtime.layout import Layout
from secateurs.runtime.linear import Packed


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


def hold_table(module: nn.Embedding, layout: Layout) -> SparseEmbedding:
    """Make an embedding hold a packed table instead of its own.

    A class that does something to the rows (Gemma's scales them) goes on to do so.

    Args:
        module: with a table of the layout's shape; changed in place.
        layout: of codes without a mask.
    """
    held: Any = module
    dtype = module.weight.dtype
    held.__class__ = _packed_kind(type(module))
    del held.weight
    held.hold(layout)
    held.dtype = dtype
    assert isinstance(held, SparseEmbedding)
    return held


def _packed_kind(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    """Of a class, one whose `super().forward` is that of `SparseEmbedding`."""
    if kind is nn.Embedding:
        return SparseEmbedding
    return type(f"Sparse{kind.__name__}", (kind, SparseEmbedding), {})
