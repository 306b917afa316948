"""A model folder as files: safetensors read one tensor at a time, validated before anything is trusted.

Only safetensors are opened; a folder with pickled weights is refused. Nothing here knows what a layer is.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateurs.finite import all_finite

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


class Checkpoint:
    """The tensors of a Hugging Face model folder, by their names in its files.

    Args:
        folder: holds `config.json` and `model.safetensors`, or the shards that
            `model.safetensors.index.json` lists.

    Raises:
        ValueError: the folder, its config, its index or one of its shards is missing, truncated or
            malformed, or the index points outside the folder. One line; names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"no model folder at '{self.folder}'")
        self.config = read_json(self.folder / "config.json")
        self.file_of = self._weight_map()
        self.files = sorted(set(self.file_of.values()))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # by safetensors' names
        found: dict[str, str] = {}
        for file in self.files:
            with self._open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                    found[name] = file
                    tensor = shard.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
        for name, file in self.file_of.items():
            if found.get(name) != file:
                raise ValueError(
                    f"'{self.folder / INDEX}' promises '{name}' in '{file}', which does not hold it"
                )

    def _weight_map(self) -> dict[str, str]:
        """Tensor name -> file name inside the folder."""
        if (self.folder / SINGLE).is_file():
            with self._open(SINGLE) as shard:
                return dict.fromkeys(shard.keys(), SINGLE)
        if not (self.folder / INDEX).is_file():
            pickled = [*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")]
            hint = (
                f"; '{pickled[0].name}' is pickled and is not opened: convert it to safetensors"
                if pickled
                else ""
            )
            raise ValueError(f"no '{SINGLE}' or '{INDEX}' in '{self.folder}'{hint}")
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
                        tensors[name] = shard.get_tensor(name)
                    except SafetensorError as error:
                        raise ValueError(
                            f"'{name}' in '{self.folder / file}' cannot be read: {error}"
                        ) from None
                    if tensors[name].is_floating_point() and not all_finite(tensors[name]):
                        raise ValueError(f"'{name}' in '{self.folder / file}' holds NaN or Inf")
        return tensors

    def companions(self) -> list[Path]:
        """The files beside the weights that make the folder a model: configs, tokenizer, licence."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file()
            and (path.suffix in COMPANION_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE")))
            and not path.name.endswith(".index.json")
        )

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from an edited or another one: config, and files with size and time."""
        stats = {file: (self.folder / file).stat() for file in self.files}
        return {
            "config": self.config,
            "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        }


def resolve(model: str | Path) -> Path:
    """The local folder of a model given as a folder or as a name on the Hugging Face hub.

    Raises:
        ValueError: neither a folder here nor a model that the hub gives.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(f"no model folder at '{model}'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", *(f"*{suffix}" for suffix in COMPANION_SUFFIXES), "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"'{model}' is not a folder here and could not be fetched from the Hugging Face hub ({reason}); "
            "pass the path of a model folder"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError in one line if it is missing or broken."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"'{path}' is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not readable JSON ({error})") from None
    return as_object(text, f"'{path}'")


def as_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object from text; ValueError in one line, which names `what` it is, if it is none."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} does not hold a JSON object")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write so that `path` is either absent, the old file, or the whole new one."""
    _replace(
        path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    )


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Like `write_json`, for a safetensors file."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))


def copy_file(source: Path, target: Path) -> None:
    """Like `write_json`, for a copy."""
    _replace(target, lambda temporary: shutil.copyfile(source, temporary))


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # a killed run may have left one
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write '{path}': {error}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
