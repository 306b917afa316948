"""Trained weights under the names, dtypes and shapes of the files that they came from.

A trained model is the folder it came from with other weights: what reads the one reads the other. So its
tensors go back where they were read, each in the dtype it had there; and what training left as it was, or
what the model does not know (old files hold masks and rotary frequencies), is what the file holds.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.pieces import Piece, pieces_of
from secateurs.checkpoint.shards import Shards, Stored
from secateurs.finite import all_finite
from secateurs.training.cutting import gathered, local, trained_of


class StoredWeights:
    """The tensors of a model, by their names in its checkpoint.

    Args:
        model: as it was loaded, before anything wraps it. Its parameters are kept hold of.
        checkpoint: that it was loaded from.

    Raises:
        ValueError: the files do not hold a tensor of the model, or a tensor holds NaN or Inf.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._own: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._places: dict[str, list[tuple[str, Piece]]] = {}  # by name in the files
        homes: set[int] = set()
        for name, pieces in pieces_of(checkpoint, model).items():
            homes.add(id(self._own[name]))
            for piece in pieces:
                self._places.setdefault(piece.stored, []).append((name, piece))
        for name, tensor in self._own.items():
            if id(tensor) not in homes:  # not even for one that it is tied to
                raise ValueError(
                    f"'{checkpoint.folder}' does not hold '{name}', which the model has, so it cannot be "
                    "put back there"
                )
            if tensor.is_floating_point() and not all_finite(tensor.detach()):
                raise ValueError(f"'{name}' in '{checkpoint.folder}' holds NaN or Inf")
        self._check_others()

    def _check_others(self) -> None:
        for name in self.checkpoint.file_of.keys() - self._places.keys():
            self.checkpoint.load([name])  # names what is not finite, which must not turn up after training

    def release(self) -> None:
        """Let go of the model, for others are to hold its tensors, in parts."""
        self._own = {}

    @torch.no_grad()
    def gather(self, model: PreTrainedModel, device: torch.device) -> None:
        """Take hold of the tensors of a model that is sharded, copied to main memory: a collective call."""
        for name, tensor in model.state_dict(keep_vars=True).items():
            self._own[name] = trained_of(tensor.to(device) if isinstance(tensor, DTensor) else tensor).cpu()

    @torch.no_grad()
    def scatter(self, model: PreTrainedModel) -> None:
        """Give a model that is sharded the values that `gather` took from it, as they are now."""
        for name, tensor in model.state_dict(keep_vars=True).items():
            value = self._own[name]
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            with gathered(tensor, written=True):
                local(tensor).copy_(local(value))

    @torch.no_grad()
    def round(self) -> None:
        """Give the model the values that it will be stored with.

        Raises:
            FloatingPointError: one of them is beyond the range of its dtype.
        """
        for stored, tensor in self._tensors():
            if stored in self._places and tensor.is_floating_point() and not all_finite(tensor):
                raise FloatingPointError(
                    f"'{stored}' has values that {tensor.dtype} cannot hold: train at a smaller rate"
                )
            for name, piece in self._places.get(stored, ()):
                piece.of(self._own[name]).copy_(piece.within(tensor.contiguous()))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model the values that it was loaded with."""
        for stored, places in self._places.items():
            tensor = self.checkpoint.load([stored])[stored]
            for name, piece in places:
                piece.of(self._own[name]).copy_(piece.within(tensor))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is to be stored, one by one."""
        for stored in self.checkpoint.file_of:
            before = self.checkpoint.load([stored])[stored]
            places = self._places.get(stored, [])
            now = before.clone() if not places else before.to(self._own[places[0][0]].dtype, copy=True)
            for name, piece in places:
                piece.within(now).copy_(piece.of(self._own[name].detach()))
            # A file may hold more bits than were loaded: they stay where training had nothing to change.
            yield stored, before if torch.equal(before.to(now.dtype), now) else now.to(before.dtype)

    def write(self, folder: Path, *, most: int) -> None:
        """Write weight files into an existing folder.

        Args:
            folder: without weight files.
            most: bytes of tensors in one file.
        """
        checkpoint = self.checkpoint
        layout = {
            name: Stored(checkpoint.dtypes[name], checkpoint.shapes[name]) for name in checkpoint.file_of
        }
        shards = Shards(folder, layout, most=most)
        shards.lay_out()
        shards.write(self._tensors())
        shards.finish()
