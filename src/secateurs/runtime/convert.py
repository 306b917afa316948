"""From a folder of dense weights to a compressed one, and back, shard by shard."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateurs.checkpoint import INDEX, Checkpoint, copy_file, resolve, write_json, write_tensors
from secateurs.runtime.format import DTYPES, MOST_WEIGHTS, VERSION, Layout, pack, padded, row_offsets
from secateurs.runtime.kernels import expand
from secateurs.runtime.quantizer import (
    GUARD,
    METHOD,
    SecateursConfig,
    linear_shapes,
    matching_layers,
    module_name,
)
from secateurs.runtime.settings import CompressSettings, DecompressSettings
from secateurs.settings import takes

WORTH = 0.9  # of the dense bytes: saving less does not pay for expanding the layer at every long prompt


@dataclass(frozen=True)
class Compression:
    """What `compress` did.

    Args:
        layers: compressed weights.
        dense_layers: linear layers left dense.
        bytes_before: of all weight files.
        bytes_after: of all weight files.
    """

    layers: int
    dense_layers: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers compressed, {self.dense_layers} left dense; "
            f"{self.bytes_before / 1e6:.1f} MB became {self.bytes_after / 1e6:.1f} MB"
        )


@takes(CompressSettings)
def compress(model: str | Path, *, settings: CompressSettings) -> Compression:
    """Writes a pruned model in the compressed format, which `from_pretrained` loads after `import secateurs`.

    Args:
        model: a model folder or a name on the Hugging Face hub.

    Raises:
        ValueError: the model is broken, already compressed or quantised, or the output exists.
    """
    checkpoint = Checkpoint(resolve(model))
    if "quantization_config" in checkpoint.config:
        raise ValueError(f"'{checkpoint.folder}' is compressed or quantised already")
    skeleton = skeleton_of(checkpoint)
    shapes = linear_shapes(skeleton)
    layers: dict[str, Any] = {}

    def packed(key: str, weight: torch.Tensor) -> torch.Tensor:
        name = module_name(key.removesuffix(".weight"), shapes, skeleton) if key.endswith(".weight") else None
        if name is None or weight.dtype not in DTYPES.values():
            return weight
        matrix = weight.T if _is_transposed(skeleton, name) else weight
        if matrix.shape[0] * padded(matrix.shape[1]) > MOST_WEIGHTS:
            return weight
        layout = Layout(matrix.shape[0], matrix.shape[1], int(torch.count_nonzero(matrix)), matrix.dtype)
        if layout.bytes > WORTH * layout.dense_bytes:
            return weight
        result, layout = pack(matrix)
        layers[name] = layout.to_json()
        return result

    def compressed(config: dict[str, Any]) -> dict[str, Any]:
        written = {"quant_method": METHOD, "version": VERSION, "layers": layers}
        return config | {"quantization_config": written, "transformers_weights": GUARD}

    output = Path(settings.output)
    _rewrite(checkpoint, output, packed, compressed)
    after = Checkpoint(output)
    return Compression(len(layers), len(shapes) - len(layers), checkpoint.bytes, after.bytes)


@takes(DecompressSettings)
def decompress(model: str | Path, *, settings: DecompressSettings) -> None:
    """Writes a compressed model as an ordinary dense one: what was compressed, up to the sign of zeros.

    Args:
        model: a compressed model folder or a name on the Hugging Face hub.

    Raises:
        ValueError: the model is broken or not compressed, or the output exists.
    """
    checkpoint = Checkpoint(resolve(model))
    packing = checkpoint.config.get("quantization_config")
    if not isinstance(packing, dict) or packing.get("quant_method") != METHOD:
        raise ValueError(f"'{checkpoint.folder}' is not compressed")
    skeleton = skeleton_of(checkpoint)
    files = [checkpoint.folder / file for file in checkpoint.files]
    layouts = matching_layers(SecateursConfig.from_dict(packing).layers, skeleton, files)

    def dense(key: str, packed: torch.Tensor) -> torch.Tensor:
        name = (
            module_name(key.removesuffix(".weight"), layouts, skeleton) if key.endswith(".weight") else None
        )
        if name is None:
            return packed
        matrix = unpacked(name, packed, layouts[name])
        return matrix.T if _is_transposed(skeleton, name) else matrix

    def plain(config: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k not in ("quantization_config", "transformers_weights")}

    _rewrite(checkpoint, Path(settings.output), dense, plain)


def unpacked(name: str, packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The dense weight (rows, columns) of a packed one; ValueError if it is not what its layout says."""
    return expand(packed, row_offsets(name, packed, layout), layout, 0, layout.rows)


def skeleton_of(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model without weights; ValueError if transformers cannot tell it from the configuration."""
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"'{checkpoint.folder / 'config.json'}' does not describe a causal model ({reason})"
        ) from None


def _is_transposed(skeleton: PreTrainedModel, name: str) -> bool:
    return isinstance(skeleton.get_submodule(name), Conv1D)


def _rewrite(
    checkpoint: Checkpoint,
    output: Path,
    convert: Callable[[str, torch.Tensor], torch.Tensor],
    new_config: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Copies a model folder, each tensor through `convert`. The output appears when it is complete."""
    if output.exists():
        raise ValueError(f"'{output}' exists already; name another output folder")
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        total = 0
        for file in checkpoint.files:
            keys = [key for key, home in checkpoint.file_of.items() if home == file]
            tensors = {key: convert(key, checkpoint.load([key])[key]) for key in keys}
            total += sum(tensor.nbytes for tensor in tensors.values())
            write_tensors(partial / file, tensors)
        if (checkpoint.folder / INDEX).is_file():
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": checkpoint.file_of})
        for companion in checkpoint.companions():
            if companion.name != "config.json":
                copy_file(companion, partial / companion.name)
        write_json(partial / "config.json", new_config(checkpoint.config))
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
