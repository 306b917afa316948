"""A model folder's parameters, dense or compressed, read one at a time."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import is_compressed
from secateurs.checkpoint.names import own_names, packed_names
from secateurs.checkpoint.pieces import assemble, pieces_of
from secateurs.runtime.format import experts_offsets, row_offsets
from secateurs.runtime.kernels import expand
from secateurs.runtime.layout import ExpertsLayout, Layout
from secateurs.runtime.packable import packables, traced_packables
from secateurs.runtime.quantizer import SecateursConfig, matching_layers
from secateurs.values import Values


class Parameters:
    """What a folder's files hold of a model, by the model's own names.

    Args:
        checkpoint: the model's files.
        skeleton: `skeleton_of(checkpoint)`.

    Raises:
        ValueError: as `pieces_of`, and as `matching_layers` where it is compressed; or what is packed is not
            what was stored.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        self.packables = packables(skeleton) | traced_packables(skeleton)
        self.layouts: dict[str, Layout | ExpertsLayout] = {}
        """Of what is packed, by the names of `packables`."""
        if is_compressed(checkpoint):
            promised = SecateursConfig.from_dict(checkpoint.config["quantization_config"]).layers
            files = [checkpoint.folder / file for file in checkpoint.files]
            self.layouts = matching_layers(promised, skeleton, files)
            for name, layout in self.layouts.items():
                if name not in self.packables or self.packables[name].shape != layout.shape:
                    kind = type(skeleton).__name__
                    raise ValueError(
                        f"compressed layer '{name}' is {layout.shape}, which {kind} does not multiply by"
                    )
        self.pieces = pieces_of(checkpoint, skeleton)
        """Stored tensors that each is made of: of what is packed, those that are stored once it is dense."""
        for name in self.layouts:
            if self.packables[name].parameter not in self.pieces:
                raise ValueError(f"compressed layer '{name}' is not stored as config.json says that it was")
        names = own_names(checkpoint.file_of, skeleton, packed_names(skeleton)) if self.layouts else {}
        stored = {name: key for key, name in names.items()}
        self.packed = {name: stored[self.packables[name].packed] for name in self.layouts}
        """The stored tensor of each that is packed."""
        self._layer = {self.packables[name].parameter: name for name in self.layouts}
        self._last: tuple[str, Tensor] | None = None

    @property
    def grids(self) -> dict[str, Values]:
        """Of the parameters whose packed values are codes."""
        return {
            self.packables[name].parameter: layout.codes.values
            for name, layout in self.layouts.items()
            if layout.codes is not None
        }

    def read(self, name: str) -> Tensor:
        """A parameter, dense, in the dtype it is stored in; the last one read is kept, for experts.

        Raises:
            ValueError: it is not what its layout says, or holds NaN or Inf.
        """
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._read(name))
        return self._last[1]

    def _read(self, name: str) -> Tensor:
        layer = self._layer.get(name)
        if layer is None:
            pieces = self.pieces[name]
            return assemble(pieces, self._checkpoint.load(dict.fromkeys(piece.stored for piece in pieces)))
        key = self.packed[layer]
        matrices = unpacked(layer, self._checkpoint.load([key])[key], self.layouts[layer])
        return self.packables[layer].parameter_of(matrices)


def unpacked(name: str, packed: Tensor, layout: Layout | ExpertsLayout) -> Tensor:
    """The dense matrix (rows, columns) of a packed one, or those of experts (experts, rows, columns).

    Raises:
        ValueError: it is not what its layout says.
    """
    if isinstance(layout, Layout):
        return expand(packed, row_offsets(name, packed, layout), layout, 0, layout.rows)
    offsets = experts_offsets(name, packed, layout)
    return torch.stack(
        [
            expand(layout.part(packed, i), offsets[i], each, 0, each.rows)
            for i, each in enumerate(layout.layouts)
        ]
    )
