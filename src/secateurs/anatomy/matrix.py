"""A matrix of a block: what solvers, masks, compression and inspection work on, wherever its weights lie."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """W (out, in) of a product W x, as a view of a parameter: of a linear layer's weight, of a `Conv1D`'s,
    which is stored (in, out), or of one expert's part of a parameter that holds those of all experts.
    """

    name: str
    """Within the block: the layer's path, or for an expert the parameter's with the expert's number before
    its last part, as in "mlp.experts.3.down_proj"."""

    weight: str
    """The parameter that it lies in: its name within the block."""

    shape: tuple[int, int]
    """(out, in)."""

    bias: str | None = None
    """The parameter that its bias lies in."""

    transposed: bool = False
    """Stored (in, out)."""

    expert: int | None = None
    """Its place in a parameter (experts, out, in), or transposed (experts, in, out), and in a bias (experts,
    out). The first two sides may also be one, experts' rows below each other."""

    def of(self, parameter: Tensor) -> Tensor:
        """(out, in): a view of the parameter, so that writing to it writes there."""
        part = self._part(parameter, self.shape[::-1] if self.transposed else self.shape)
        return part.T if self.transposed else part

    def bias_of(self, parameter: Tensor) -> Tensor:
        """(out,): a view."""
        return self._part(parameter, self.shape[:1])

    def _part(self, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """Of what all experts have in a parameter, this one's of a shape."""
        if self.expert is None:
            return parameter
        flat = parameter.ndim == len(shape)
        return (parameter.unflatten(0, (-1, shape[0])) if flat else parameter)[self.expert]
