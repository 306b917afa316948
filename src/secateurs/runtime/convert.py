"""From a folder of dense weights to a compressed one, and back, shard by shard."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateurs.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    check_output,
    check_place,
    copy_companions,
    copy_file,
    new_folder,
    output_lock,
    resolve,
    write_json,
    write_tensors,
)
from secateurs.checkpoint.card import write_card
from secateurs.checkpoint.config import is_compressed
from secateurs.checkpoint.names import skeleton_of
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

RECORD = "secateurs.json"
"""How the weights were pruned: as true of them compressed."""


@dataclass(frozen=True)
class Compression:
    """What `compress` did.

    Args:
        layers: compressed weights.
        dense_layers: linear layers left dense.
        bytes_before: of all weight files.
        bytes_after: of all weight files.
        share: of the bytes before, those of weights that are now packed.
    """

    layers: int
    dense_layers: int
    bytes_before: int
    bytes_after: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.layers} layers compressed, {self.dense_layers} left dense; "
            f"{self.bytes_before / 1e6:.1f} MB became {self.bytes_after / 1e6:.1f} MB "
            f"({self.share:.0%} of the weights' bytes are packed)"
        )


@takes(CompressSettings)
def compress(model: str | Path, *, settings: CompressSettings) -> Compression:
    """Writes a pruned model in the compressed format, which `from_pretrained` loads after `import secateurs`.

    All weights are read twice: once to find what is worth it, and how large the output will be, once to pack.

    Args:
        model: a model folder or a name on the Hugging Face hub.

    Raises:
        ValueError: the model is broken, already compressed or quantised, no layer has zeros enough, the
            output exists or cannot be made. Nothing is written.
        OSError: the disk is too small or fails.
    """
    checkpoint, output = Checkpoint(resolve(model)), Path(settings.output)
    if is_compressed(checkpoint):
        raise ValueError(f"'{checkpoint.folder}' is compressed already")
    check_place(output, checkpoint)
    with output_lock(output):
        return _compress(str(model), checkpoint, output)


def _compress(model: str, checkpoint: Checkpoint, output: Path) -> Compression:
    check_output(output, checkpoint, 0)
    skeleton = skeleton_of(checkpoint)
    layouts = _survey(checkpoint, skeleton)
    dense_bytes = sum(layout.dense_bytes for layout in layouts.values())
    packed_bytes = sum(layout.bytes for layout in layouts.values())
    check_output(output, checkpoint, checkpoint.bytes - dense_bytes + packed_bytes)

    def packed(key: str, weight: torch.Tensor) -> torch.Tensor:
        name = _module_of(key, layouts, skeleton)
        return weight if name is None else pack(_turned(weight, skeleton, name))[0]

    layers = {name: layout.to_json() for name, layout in layouts.items()}
    packing = {"quant_method": METHOD, "version": VERSION, "layers": layers}
    config = {**checkpoint.config, "quantization_config": packing, "transformers_weights": GUARD}
    with new_folder(output) as folder:
        _rewrite(checkpoint, folder, packed, config)
        done = Compression(
            layers=len(layouts),
            dense_layers=len(linear_shapes(skeleton)) - len(layouts),
            bytes_before=checkpoint.bytes,
            bytes_after=Checkpoint(folder).bytes,
            share=dense_bytes / checkpoint.tensor_bytes,
        )
        write_card(
            folder,
            checkpoint.folder,
            model,
            title="compressed",
            facts=[("Compressed", str(done))],
            usage="import secateurs  # or transformers refuses the packed weights",
            tags=["sparse", "compressed"],
        )
    return done


@takes(DecompressSettings)
def decompress(model: str | Path, *, settings: DecompressSettings) -> None:
    """Writes a compressed model as an ordinary dense one: what was compressed, up to the sign of zeros.

    Args:
        model: a compressed model folder or a name on the Hugging Face hub.

    Raises:
        ValueError: the model is broken or not compressed, or the output exists or cannot be made.
        OSError: the disk is too small or fails.
    """
    checkpoint, output = Checkpoint(resolve(model)), Path(settings.output)
    if not is_compressed(checkpoint):
        raise ValueError(f"'{checkpoint.folder}' is not compressed")
    check_place(output, checkpoint)
    with output_lock(output):
        _decompress(str(model), checkpoint, output)


def _decompress(model: str, checkpoint: Checkpoint, output: Path) -> None:
    skeleton = skeleton_of(checkpoint)
    files = [checkpoint.folder / file for file in checkpoint.files]
    promised = SecateursConfig.from_dict(checkpoint.config["quantization_config"]).layers
    layouts = matching_layers(promised, skeleton, files)
    more_bytes = sum(layout.dense_bytes - layout.bytes for layout in layouts.values())
    check_output(output, checkpoint, checkpoint.bytes + more_bytes)

    def dense(key: str, packed: torch.Tensor) -> torch.Tensor:
        name = _module_of(key, layouts, skeleton)
        return packed if name is None else _turned(unpacked(name, packed, layouts[name]), skeleton, name)

    ours = ("quantization_config", "transformers_weights")
    config = {key: value for key, value in checkpoint.config.items() if key not in ours}
    with new_folder(output) as folder:
        _rewrite(checkpoint, folder, dense, config)
        write_card(
            folder,
            checkpoint.folder,
            model,
            title="decompressed",
            facts=[("Decompressed", f"{len(layouts)} layers, which are dense again and keep their zeros")],
            usage="",
            tags=["sparse"],
        )


def unpacked(name: str, packed: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The dense weight (rows, columns) of a packed one; ValueError if it is not what its layout says."""
    return expand(packed, row_offsets(name, packed, layout), layout, 0, layout.rows)


def _survey(checkpoint: Checkpoint, skeleton: PreTrainedModel) -> dict[str, Layout]:
    """Module name -> layout of the layers that are worth compressing; ValueError if there are none."""
    shapes = linear_shapes(skeleton)
    layouts: dict[str, Layout] = {}
    most, needed, whose = 0.0, 0.0, ""
    for key in checkpoint.file_of:
        name = _module_of(key, shapes, skeleton)
        if name is None:
            continue
        weight = checkpoint.load([key])[key]
        rows, columns = shapes[name]
        if weight.dtype not in DTYPES.values() or rows * padded(columns) > MOST_WEIGHTS or not weight.numel():
            continue
        layout = Layout(rows, columns, int(torch.count_nonzero(weight)), weight.dtype)
        if layout.bytes <= WORTH * layout.dense_bytes:
            layouts[name] = layout
        zeros = 1 - layout.nonzeros / weight.numel()
        if not whose or zeros > most:
            # What the mask and the tail take, and a tenth to be saved.
            overhead = layout.bytes - layout.nonzeros * weight.itemsize
            most, needed, whose = zeros, 1 - WORTH + overhead / layout.dense_bytes, name
    if not layouts:
        found = (
            f"'{whose}' has the most zeros, {most:.1%}, where {needed:.0%} are needed: prune it first"
            if whose
            else "it has no linear layers in float32, bfloat16 or float16"
        )
        raise ValueError(f"nothing in '{checkpoint.folder}' is worth compressing: {found}")
    return layouts


def _module_of(key: str, names: Any, skeleton: PreTrainedModel) -> str | None:
    """The one of `names` whose weight the files call `key`."""
    return module_name(key.removesuffix(".weight"), names, skeleton) if key.endswith(".weight") else None


def _turned(matrix: torch.Tensor, skeleton: PreTrainedModel, name: str) -> torch.Tensor:
    """A weight as it is packed from one as it is stored, and back: GPT-2 stores (in, out)."""
    return matrix.T if isinstance(skeleton.get_submodule(name), Conv1D) else matrix


def _rewrite(
    checkpoint: Checkpoint,
    folder: Path,
    convert: Callable[[str, torch.Tensor], torch.Tensor],
    config: dict[str, Any],
) -> None:
    """Fill a new folder with a checkpoint's tensors, each through `convert`, and what lies beside them."""
    total = 0
    for file in checkpoint.files:
        keys = [key for key, home in checkpoint.file_of.items() if home == file]
        tensors = {key: convert(key, checkpoint.load([key])[key]) for key in keys}
        total += sum(tensor.nbytes for tensor in tensors.values())
        write_tensors(folder / file, tensors)
    if checkpoint.files != [SINGLE]:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": checkpoint.file_of})
    copy_companions(checkpoint.folder, folder, replaced={"config.json", "README.md"})
    if (checkpoint.folder / RECORD).is_file():
        copy_file(checkpoint.folder / RECORD, folder / RECORD)
    write_json(folder / "config.json", config)
