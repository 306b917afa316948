"""The weight files of a model that is written piece by piece, in any order.

A tensor's place follows from the names, dtypes and shapes of all of them, which are known before any work: so
each file gets its header and full size first, and every tensor is written to where it will stay. Nothing is
merged at the end, memory holds no more than is being written, and the disk holds each weight once.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors import safe_open

from secateurs.checkpoint.reading import INDEX, SINGLE
from secateurs.checkpoint.writing import write_json

BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Of an element, by safetensors' names of dtypes."""


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    """By safetensors' name."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = BYTES[self.dtype]
        for side in self.shape:
            size *= side
        return size


class _Shard(NamedTuple):
    file: str
    header: bytes
    offsets: dict[str, int]
    """Of each tensor, from the beginning of the file."""
    bytes: int


class Shards:
    """Files for all tensors of a model.

    Args:
        folder: that exists.
        tensors: by name, in the order in which they are to be shared out between the files.
        most: bytes of tensors in one file, where a single tensor is not larger.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Stored], *, most: int) -> None:
        self.folder, self.tensors = folder, dict(tensors)
        groups: list[list[str]] = [[]]
        size = 0
        for name, tensor in tensors.items():
            if groups[-1] and size + tensor.bytes > most:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += tensor.bytes
        count = len(groups)
        files = (
            [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
        )
        self._shards = [self._laid_out(file, names) for file, names in zip(files, groups, strict=True)]
        self._home = {name: shard for shard in self._shards for name in shard.offsets}

    def _laid_out(self, file: str, names: Iterable[str]) -> _Shard:
        # The widest first: so every tensor begins at a multiple of its element's size.
        names = sorted(names, key=lambda name: -BYTES[self.tensors[name].dtype])
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in names:
            tensor = self.tensors[name]
            offsets[name] = end
            end += tensor.bytes
            header[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = len(text).to_bytes(8, "little") + text
        return _Shard(file, begin, {n: o + len(begin) for n, o in offsets.items()}, len(begin) + end)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(shard.bytes for shard in self._shards)

    @property
    def missing_bytes(self) -> int:
        """What the disk does not hold yet: a file that is only laid out takes no space."""
        paths = [self.folder / shard.file for shard in self._shards]
        held = sum(512 * path.stat().st_blocks for path in paths if path.exists())
        return max(0, self.bytes - held)

    def lay_out(self) -> None:
        """Make the files, with nothing but zeros for tensors; those that are there stay as they are."""
        for shard in self._shards:
            path = self.folder / shard.file
            if not path.exists():
                temporary = path.with_name(path.name + ".tmp")
                try:
                    with _written(temporary, "wb") as file:
                        file.write(shard.header)
                        file.truncate(shard.bytes)
                    os.replace(temporary, path)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Put named tensors in their places, with the dtypes and shapes promised, and wait for the disk."""
        with ExitStack() as stack:
            files: dict[str, IO[bytes]] = {}
            for name, tensor in tensors:
                shard, promised = self._home[name], self.tensors[name]
                if shard.file not in files:
                    files[shard.file] = stack.enter_context(_written(self.folder / shard.file, "r+b"))
                data = tensor.detach().cpu().contiguous()
                assert (data.nbytes, tuple(data.shape)) == (promised.bytes, promised.shape)
                files[shard.file].seek(shard.offsets[name])
                files[shard.file].write(data.reshape(-1).view(torch.uint8).numpy().data)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors that have been written."""
        wanted = set(names)
        found: dict[str, torch.Tensor] = {}
        for shard in self._shards:
            if inside := wanted & shard.offsets.keys():
                with safe_open(self.folder / shard.file, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in inside}
        return found

    def finish(self) -> None:
        """Write the index, where there is more than one file."""
        if len(self._shards) > 1:
            write_json(
                self.folder / INDEX,
                {
                    "metadata": {"total_size": sum(tensor.bytes for tensor in self.tensors.values())},
                    "weight_map": {name: shard.file for name, shard in sorted(self._home.items())},
                },
            )


@contextmanager
def _written(path: Path, mode: str) -> Iterator[IO[bytes]]:
    """A file that is open, and on the disk once it is closed; an error of the disk names it."""
    try:
        with open(path, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write '{path}': {error.strerror or error}") from None


def size_in_bytes(text: str | float) -> int:
    """A size as people write it: "5GB", "500MB", or bytes.

    Raises:
        ValueError: it is none, or not above 0.
    """
    if isinstance(text, float) and text.is_integer():
        text = int(text)
    try:
        size = int(convert_file_size_to_int(int(text) if str(text).isdigit() else str(text).upper()))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"'{text}' is no size: give 5GB, 500MB, or a number of bytes")
    return size
