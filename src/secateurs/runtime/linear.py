"""A linear layer whose weight stays packed."""

from typing import Any

import torch
from torch import Tensor, nn

from secateurs.runtime.format import experts_offsets, row_offsets
from secateurs.runtime.kernels import expand, sparse_linear
from secateurs.runtime.layout import ExpertsLayout, Layout


class Packed(nn.Module):
    """What holds packed bytes, as `weight`, and where their rows begin, which kernels trust."""

    layout: Layout | ExpertsLayout
    weight: Tensor
    offsets: Tensor

    def hold(self, layout: Layout | ExpertsLayout) -> None:
        """Make room for a packed weight, or several."""
        self.layout = layout
        self.weight = nn.Parameter(torch.empty(layout.bytes, dtype=torch.uint8), requires_grad=False)
        *experts, rows, _ = layout.shape
        self.register_buffer("offsets", torch.empty(*experts, rows + 1, dtype=torch.int32), persistent=False)

    def counted(self, name: str, packed: Tensor) -> Tensor:
        """Its rows' offsets; ValueError as `row_offsets`."""
        if isinstance(self.layout, ExpertsLayout):
            return experts_offsets(name.removesuffix("_packed"), packed, self.layout)
        return row_offsets(name, packed, self.layout)

    def count(self, name: str) -> None:
        """Checks the packed weight and counts its offsets: once, after loading.

        Raises:
            ValueError: as `row_offsets`.
        """
        self.offsets = self.counted(name, self.weight.data).to(self.weight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Checks and counts what `load_state_dict` brings."""
        packed = state_dict.get(f"{prefix}weight")
        offsets = self.offsets
        if packed is not None:
            offsets = self.counted(prefix.removesuffix("."), packed).to(offsets.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.offsets = offsets


class SparseLinear(Packed, nn.Linear):
    """A frozen linear layer that holds its weight as packed bytes.

    It is an `nn.Linear`, so adapters know what to do with it, but its `weight` is (layout.bytes,) uint8:
    code that expects a matrix there fails instead of reading nonsense.

    Args:
        layout: of the weight; rows are the output features.
        bias: whether there is one.
        dtype: of the bias.
    """

    layout: Layout

    def __init__(self, layout: Layout, bias: bool, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features, self.out_features = layout.columns, layout.rows
        self.hold(layout)
        self.register_parameter("bias", nn.Parameter(torch.empty(layout.rows, dtype=dtype)) if bias else None)

    def dense_weight(self) -> Tensor:
        """W (out, in)."""
        return expand(self.weight, self.offsets, self.layout, 0, self.layout.rows)

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.weight, self.offsets, self.bias, self.layout)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, sparsity={self.layout.sparsity:.3f}"
