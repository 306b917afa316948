"""Files that appear whole or not at all: JSON, tensors, copies."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


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


def write_text(path: Path, content: str) -> None:
    """Write so that `path` is either absent, the old file, or the whole new one."""
    _replace(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Like `write_text`, for JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Like `write_json`, for a safetensors file, with what else its metadata is to say."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        save_file(contiguous, temporary, metadata={"format": "pt", **metadata})
        _sort_metadata(temporary)

    _replace(path, write)


def _sort_metadata(path: Path) -> None:
    """safetensors writes it in another order each time: the same content is to be the same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


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
