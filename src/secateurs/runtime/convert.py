"""From a folder of dense weights to a compressed one, and back, shard by shard."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateurs.checkpoint import INDEX, Checkpoint, copy_file, resolve, write_json, write_tensors
from secateurs.runtime.format import DTYPES, MOST_WEIGHTS, VERSION, Layout, pack, row_offsets
from secateurs.runtime.kernels import expand
from secateurs.runtime.quantizer import METHOD, SecateursConfig, linear_shapes, module_name

WORTH = 0.9  # of the dense bytes: a layer that would stay larger gains too little to pay for its expansion


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


def compress(model: str | Path, output: Path) -> Compression:
    """Writes a pruned model in the compressed format, which `from_pretrained` loads after `import secateurs`.

    Args:
        model: a model folder or a name on the Hugging Face hub.
        output: a folder that does not exist yet.

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
        if name is None or weight.dtype not in DTYPES.values() or weight.numel() > MOST_WEIGHTS:
            return weight
        matrix = weight.T if _is_transposed(skeleton, name) else weight
        layout = Layout(matrix.shape[0], matrix.shape[1], int(torch.count_nonzero(matrix)), matrix.dtype)
        if layout.bytes > WORTH * layout.dense_bytes:
            return weight
        result, layout = pack(matrix)
        layers[name] = layout.to_json()
        return result

    _rewrite(
        checkpoint,
        output,
        packed,
        lambda config: (
            config | {"quantization_config": {"quant_method": METHOD, "version": VERSION, "layers": layers}}
        ),
    )
    after = Checkpoint(output)
    return Compression(len(layers), len(shapes) - len(layers), checkpoint.bytes, after.bytes)


def decompress(model: str | Path, output: Path) -> None:
    """Writes a compressed model as an ordinary dense one: what was compressed, up to the sign of zeros.

    Args:
        model: a compressed model folder or a name on the Hugging Face hub.
        output: a folder that does not exist yet.

    Raises:
        ValueError: the model is broken or not compressed, or the output exists.
    """
    checkpoint = Checkpoint(resolve(model))
    settings = checkpoint.config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        raise ValueError(f"'{checkpoint.folder}' is not compressed")
    layouts = SecateursConfig.from_dict(settings).layers
    skeleton = skeleton_of(checkpoint)

    def dense(key: str, packed: torch.Tensor) -> torch.Tensor:
        name = (
            module_name(key.removesuffix(".weight"), layouts, skeleton) if key.endswith(".weight") else None
        )
        if name is None:
            return packed
        matrix = unpacked(name, packed, layouts[name])
        return matrix.T if _is_transposed(skeleton, name) else matrix

    _rewrite(
        checkpoint,
        output,
        dense,
        lambda config: {k: v for k, v in config.items() if k != "quantization_config"},
    )


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
    """Copies a model folder, each tensor through `convert`; `config.json`, written last, completes it."""
    if output.exists():
        raise ValueError(f"'{output}' exists already; name another output folder")
    output.mkdir(parents=True)
    total = 0
    for file in checkpoint.files:
        keys = [key for key, home in checkpoint.file_of.items() if home == file]
        tensors = {key: convert(key, checkpoint.load([key])[key]) for key in keys}
        total += sum(tensor.nbytes for tensor in tensors.values())
        write_tensors(output / file, tensors)
    if (checkpoint.folder / INDEX).is_file():
        write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": checkpoint.file_of})
    for companion in checkpoint.companions():
        if companion.name != "config.json":
            copy_file(companion, output / companion.name)
    write_json(output / "config.json", new_config(checkpoint.config))
