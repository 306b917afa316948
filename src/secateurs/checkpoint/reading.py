"""A model folder as files: safetensors read one tensor at a time, validated before anything is trusted.

Only safetensors are opened; a folder with pickled weights is refused. Nothing here knows what a layer is.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secateurs.checkpoint.companions import PICKLED, companions, matches
from secateurs.checkpoint.writing import read_json
from secateurs.finite import all_finite

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a Hugging Face model folder.

    They go by the names that they have in the files, until `rename` gives them others. As in transformers a
    single file comes before an index, and a shard's tensors are all read, also those that no index lists.

    Args:
        folder: holds `config.json` and `model.safetensors`, or the shards that
            `model.safetensors.index.json` lists.
        weights: whether they are looked for. Without, it is as if there were none.

    Raises:
        ValueError: the folder, its config, its index or one of its shards is missing, truncated or
            malformed, or the index points outside the folder. One line; names the file.
    """

    edited = False
    """Whether `config` is another than the folder's."""

    def __init__(self, folder: str | Path, *, weights: bool = True) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"no model folder at '{self.folder}'")
        if not (self.folder / "config.json").exists():
            if (self.folder / "adapter_config.json").exists():
                raise ValueError(
                    f"'{self.folder}' holds adapters and no model: merge them into the model that they were "
                    "trained on (merge_and_unload in PEFT), and give the merged folder"
                )
            raise ValueError(f"'{self.folder}' is no model folder: it has no config.json")
        self.config = read_json(self.folder / "config.json")
        promised = self._promised() if weights else {}
        self.files = sorted(set(promised.values())) or [SINGLE] * weights
        self.file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        """As safetensors calls them: BF16, F32, U8..."""
        for file in self.files:
            with self._open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                    self.file_of[name] = file
                    self.shapes[name] = tuple(shard.get_slice(name).get_shape())
                    self.dtypes[name] = shard.get_slice(name).get_dtype()
        for name, file in promised.items():
            if self.file_of.get(name) != file:
                raise ValueError(
                    f"'{self.folder / INDEX}' promises '{name}' in '{file}', which does not hold it"
                )
        self._in_file = {name: name for name in self.file_of}

    def _promised(self) -> dict[str, str]:
        """What the index says: tensor name -> file name inside the folder. Empty where there is one file."""
        if (self.folder / SINGLE).is_file():
            return {}
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"no '{SINGLE}' or '{INDEX}' in '{self.folder}'{self._hint()}")
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"'{self.folder / INDEX}' has no 'weight_map'")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(
                    f"'{self.folder / INDEX}' points outside its folder or not at safetensors: '{file}'"
                )
            if not (self.folder / file).is_file():
                raise ValueError(f"'{self.folder / INDEX}' lists '{file}', which is missing")
        return weight_map

    def _hint(self) -> str:
        """What stands there instead of weights that can be read."""
        names = sorted(path.name for path in self.folder.iterdir())
        for name in names:
            if matches(name, PICKLED):
                return f"; '{name}' is pickled and is not opened: convert it to safetensors"
        for name in names:
            if name.endswith(".gguf"):
                return f"; '{name}' is of llama.cpp: give that file itself"
        for name in names:
            if name.endswith(".safetensors"):
                return f"; '{name}' is there, but nothing says what belongs to the model"
        return ": get the model's weights, too"

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"'{self.folder / file}' is truncated or not a safetensors file ({error}); download it again"
            ) from None

    @property
    def bytes(self) -> int:
        """Size of all weight files together."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors together: of the files, less their headers (8 bytes of length and as many)."""
        headers = 0
        for file in self.files:
            with open(self.folder / file, "rb") as handle:
                headers += 8 + int.from_bytes(handle.read(8), "little")
        return self.bytes - headers

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names than their files do: for all that follows, and for what is written.

        Args:
            names: present name -> new name, for those that change; the new ones must differ.
        """
        new = {name: names.get(name, name) for name in self.file_of}
        assert len(set(new.values())) == len(new), "two tensors of one name"
        self.file_of = {new[name]: file for name, file in self.file_of.items()}
        self.shapes = {new[name]: shape for name, shape in self.shapes.items()}
        self.dtypes = {new[name]: dtype for name, dtype in self.dtypes.items()}
        self._in_file = {new[name]: stored for name, stored in self._in_file.items()}

    @property
    def renamed(self) -> bool:
        """Whether tensors go by other names than in the files."""
        return any(name != stored for name, stored in self._in_file.items())

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU, in their stored dtypes.

        Raises:
            ValueError: a floating-point tensor holds NaN or Inf; names it.
        """
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.file_of[name], []).append(name)
        tensors = {}
        for file, in_file in wanted.items():
            with self._open(file) as shard:
                for name in in_file:
                    try:
                        tensors[name] = shard.get_tensor(self._in_file[name])
                    except SafetensorError as error:
                        raise ValueError(
                            f"'{name}' in '{self.folder / file}' cannot be read: {error}"
                        ) from None
                    if tensors[name].is_floating_point() and not all_finite(tensors[name]):
                        raise ValueError(f"'{name}' in '{self.folder / file}' holds NaN or Inf")
        return tensors

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from an edited or another one: config, and files with size and time.

        The files beside the weights count, for they are in the output too.
        """
        beside = (path.as_posix() for path in companions(self.folder))
        stats = {file: (self.folder / file).stat() for file in [*self.files, *beside]}
        return {
            "config": self.config,
            "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        }
