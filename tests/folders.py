"""Tiny model folders as a user has them: config, weights, tokenizer, generation config."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

import families
from characters import characters


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, *, shard_size: str = "1GB") -> Path:
    """Write the family's tiny model with a tokenizer to `folder`."""
    model = families.build(name, dtype)
    model.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder, max_shard_size=shard_size)
    characters().save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors in the folder's files, by their names there."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        content = load_file(file)
        assert not tensors.keys() & content.keys()
        tensors.update(content)
    return tensors


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the weights of a single-file model."""
    assert not (folder / "model.safetensors.index.json").exists()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below a folder: the content of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
