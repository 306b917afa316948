"""What a pass through a model costs: floating point operations, by the sizes of what is multiplied."""

from typing import Any

from torch import Tensor, nn

from secateurs.training.cutting import Kept, positions, shape_of
from secateurs.training.omission import Omission, decoder_of, parameter_of
from secateurs.training.units import KINDS


class Work:
    """Floating point operations of the blocks' matrices, of causal attention and of the head.

    Two per multiply-add; the backward pass costs as much as the forward pass again for the gradient of the
    input, and again for that of the weights unless they are frozen. Of experts those count that a token goes
    to. What else a block does (recurrences, convolutions, attention whose heads are not known) is left out.

    Args:
        omission: of the model.
        model: the model, in whatever wrapping.
        kept: the units that run; by default all.
    """

    def __init__(self, omission: Omission, model: nn.Module, kept: Kept | None = None) -> None:
        head: Any = decoder_of(model).get_output_embeddings()  # type: ignore[operator]
        sizes: list[tuple[float, bool]] = []  # of what is multiplied, and whether it is trained
        if head is not None:
            sizes.append((shape_of(head.weight).numel(), head.weight.requires_grad))
        self._width = 0.0  # of all the heads of all blocks
        anatomies = omission.proven.anatomy.blocks
        for number, (block, inside) in enumerate(zip(omission.blocks, anatomies, strict=True)):
            masks = {kind: None if kept is None else kept[number][kind] for kind in KINDS}
            for kind, layers in block.layers.items():
                for layer in layers:
                    weight = layer.slices[0].parameter
                    share = _share(masks[kind], layer.unit)
                    sizes.append((share * shape_of(weight).numel(), weight.requires_grad))
            sliced = {name for cut in block.cuts.values() for name in (*cut.writers, cut.reader)}
            for matrix in inside.matrices.values():
                if matrix.name not in sliced:
                    out, width = matrix.shape
                    weight = parameter_of(block.module, matrix.weight)
                    sizes.append((out * width * inside.routed.get(matrix.weight, 1.0), weight.requires_grad))
            if inside.heads is not None:
                heads = masks["attention"]
                share = 1.0 if heads is None else float(heads.double().mean())
                self._width += inside.heads.count * inside.heads.dim * share
        self._forward = sum(2 * size for size, _ in sizes)
        self._backward = sum((4 if trained else 2) * size for size, trained in sizes)

    def passes(self, length: float) -> tuple[float, float]:
        """Of one sequence of `length` tokens, forward and backward."""
        attention = 2 * length * self._width  # each token with half of the others, keys and values
        return length * (self._forward + attention), length * (self._backward + 2 * attention)


def _share(mask: Tensor | None, unit: Tensor) -> float:
    return 1.0 if mask is None else len(positions(mask, unit)[0]) / len(unit)
