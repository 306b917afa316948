"""From a folder of dense weights to a compressed one, and back, shard by shard."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
from secateurs.checkpoint.names import abbreviated, skeleton_of
from secateurs.checkpoint.pieces import Piece, take_apart
from secateurs.runtime.format import (
    DTYPES,
    MOST_WEIGHTS,
    VERSION,
    VERSION_WITH_EXPERTS,
    ExpertsLayout,
    Layout,
    pack,
    pack_experts,
    padded,
)
from secateurs.runtime.packable import Packable, is_experts, read_elsewhere
from secateurs.runtime.parameters import Parameters
from secateurs.runtime.quantizer import GUARD, METHOD
from secateurs.runtime.settings import CompressSettings, DecompressSettings
from secateurs.settings import takes

WORTH = 0.9  # of the dense bytes: saving less does not pay for expanding the layer at every long prompt

RECORD = "secateurs.json"
"""How the weights were pruned: as true of them compressed."""


@dataclass(frozen=True)
class Compression:
    """What `compress` did.

    Args:
        layers: compressed weights. Each expert's matrices count.
        dense_layers: linear layers and experts' matrices left dense.
        bytes_before: of all weight files.
        bytes_after: of all weight files.
        share: of the bytes before, those of weights that are now packed.
        experts: how many of the compressed weights are experts'.
        outside: matrices of experts that cannot be packed, by the class that keeps them.
        unpacked: other weights that have zeros enough and cannot be packed: their shares of the bytes before.
    """

    layers: int
    dense_layers: int
    bytes_before: int
    bytes_after: int
    share: float
    experts: int = 0
    outside: Mapping[str, int] = field(default_factory=dict)
    unpacked: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        experts = f" ({self.experts} of them experts')" if self.experts else ""
        outside = " and ".join(f"{count} of {kind}" for kind, count in self.outside.items())
        outside = f" ({outside} cannot be packed)" if outside else ""
        unpacked, share = "", sum(self.unpacked.values())
        if share >= 0.01:
            names = [f"'{name}'" for name in self.unpacked][:3] + ["..."] * (len(self.unpacked) > 3)
            unpacked = f"; {share:.0%} have zeros and cannot be packed: {', '.join(names)}"
        return (
            f"{self.layers} layers compressed{experts}, {self.dense_layers} left dense{outside}; "
            f"{self.bytes_before / 1e6:.1f} MB became {self.bytes_after / 1e6:.1f} MB "
            f"({self.share:.0%} of the weights' bytes are packed){unpacked}"
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
    parameters = Parameters(checkpoint, skeleton)
    survey = _survey(checkpoint, skeleton, parameters)
    layouts = survey.layouts
    dense_bytes = sum(layout.dense_bytes for layout in layouts.values())
    packed_bytes = sum(layout.bytes for layout in layouts.values())
    check_output(output, checkpoint, checkpoint.bytes - dense_bytes + packed_bytes)

    def step(name: str) -> _Step:
        packable, layout = parameters.packables[name], layouts[name]
        pieces = parameters.pieces[packable.parameter]

        def packed() -> dict[str, Tensor]:
            matrices = packable.turned(parameters.read(packable.parameter))
            if isinstance(layout, ExpertsLayout):
                return {packable.packed: pack_experts(matrices, layout.stored)[0]}
            return {pieces[0].stored: pack(matrices)[0]}

        return _Step([piece.stored for piece in pieces], packed)

    layers = {name: layout.to_json() for name, layout in layouts.items()}
    with_experts = any(isinstance(layout, ExpertsLayout) for layout in layouts.values())
    version = VERSION_WITH_EXPERTS if with_experts or survey.renamed else VERSION
    packing = {"quant_method": METHOD, "version": version, "layers": layers}
    config = {**checkpoint.config, "quantization_config": packing, "transformers_weights": GUARD}
    counts = {name: packable.matrices for name, packable in parameters.packables.items()}
    with new_folder(output) as folder:
        _rewrite(checkpoint, folder, map(step, layouts), config)
        done = Compression(
            layers=sum(counts[name] for name in layouts),
            dense_layers=sum(counts[name] for name in counts.keys() - layouts.keys())
            + sum(survey.outside.values()),
            bytes_before=checkpoint.bytes,
            bytes_after=Checkpoint(folder).bytes,
            share=dense_bytes / checkpoint.tensor_bytes,
            experts=sum(counts[n] for n, layout in layouts.items() if isinstance(layout, ExpertsLayout)),
            outside=survey.outside,
            unpacked={name: size / checkpoint.tensor_bytes for name, size in survey.unpacked.items()},
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
    parameters = Parameters(checkpoint, skeleton)
    layouts = parameters.layouts
    more_bytes = sum(layout.dense_bytes - layout.bytes for layout in layouts.values())
    check_output(output, checkpoint, checkpoint.bytes + more_bytes)

    def step(name: str) -> _Step:
        parameter = parameters.packables[name].parameter
        return _Step(
            [parameters.packed[name]],
            lambda: take_apart(parameters.read(parameter), parameters.pieces[parameter]),
        )

    ours = ("quantization_config", "transformers_weights")
    config = {key: value for key, value in checkpoint.config.items() if key not in ours}
    count = sum(parameters.packables[name].matrices for name in layouts)
    with new_folder(output) as folder:
        _rewrite(checkpoint, folder, map(step, layouts), config)
        write_card(
            folder,
            checkpoint.folder,
            model,
            title="decompressed",
            facts=[("Decompressed", f"{count} layers, which are dense again and keep their zeros")],
            usage="",
            tags=["sparse"],
        )


class _Survey(NamedTuple):
    """What a look at all weights found."""

    layouts: dict[str, Layout | ExpertsLayout]
    """Of what is worth compressing, by the names of `packables`."""
    renamed: bool
    """Whether one of these is stored under another name than the model's, with or without the bare model's
    prefix."""
    outside: dict[str, int]
    """See `Compression`."""
    unpacked: dict[str, int]
    """The same, in bytes."""


def _survey(checkpoint: Checkpoint, skeleton: PreTrainedModel, parameters: Parameters) -> _Survey:
    """Find what is worth compressing; ValueError if nothing is."""
    name_of = {packable.parameter: name for name, packable in parameters.packables.items()}
    elsewhere = read_elsewhere(skeleton)
    layouts: dict[str, Layout | ExpertsLayout] = {}
    unpacked: dict[str, Layout | ExpertsLayout] = {}
    most, needed, whose = 0.0, 0.0, ""
    for parameter, pieces in parameters.pieces.items():
        shape, dtype = pieces[0].parameter_shape, pieces[0].dtype
        if len(shape) < 2 or {piece.dtype for piece in pieces} != {dtype} or dtype not in DTYPES.values():
            continue
        name = name_of.get(parameter)
        packable = parameters.packables[name] if name else Packable("", "", (prod(shape[:-1]), shape[-1]))
        rows, columns = packable.shape[-2:]
        if rows * padded(columns) > MOST_WEIGHTS:
            continue
        weights = parameters.read(parameter)
        matrices = packable.turned(weights) if name else weights.reshape(packable.shape)
        layout = _layout(matrices, packable, pieces)
        worth = layout.bytes <= WORTH * layout.dense_bytes
        zeros = 1 - layout.nonzeros / weights.numel()
        if name is None or name in elsewhere or not _can_be_packed(packable, pieces):
            if worth and pieces[0].stored not in {parameters.pieces[each][0].stored for each in unpacked}:
                unpacked[parameter] = layout  # tied weights once
            continue
        if worth:
            layouts[name] = layout
        if not whose or zeros > most:
            # What the mask and the tail take, and a tenth to be saved.
            overhead = layout.bytes - layout.nonzeros * layout.dtype.itemsize
            most, needed, whose = zeros, 1 - WORTH + overhead / layout.dense_bytes, name
    if not layouts:
        found = "it has no linear layers in float32, bfloat16 or float16"
        if whose:
            found = f"'{whose}' has the most zeros, {most:.1%}, where {needed:.0%} are needed: prune it first"
        if unpacked:
            name, layout = max(unpacked.items(), key=lambda each: each[1].dense_bytes)
            kind = type(skeleton.get_submodule(name.rpartition(".")[0])).__name__
            found = f"'{name}' has {layout.sparsity:.1%} zeros, but what {kind} keeps cannot be packed"
        raise ValueError(f"nothing in '{checkpoint.folder}' is worth compressing: {found}")
    sizes = {name: layout.dense_bytes for name, layout in unpacked.items()}
    return _Survey(layouts, _renamed(layouts, skeleton, parameters), _outside(skeleton), sizes)


def _layout(matrices: Tensor, packable: Packable, pieces: tuple[Piece, ...]) -> Layout | ExpertsLayout:
    """Of matrices (out, in) or (experts, out, in), once they are packed."""
    rows, columns = packable.shape[-2:]
    counts = [int(torch.count_nonzero(matrix)) for matrix in matrices.reshape(-1, rows, columns)]
    layouts = tuple(Layout(rows, columns, count, matrices.dtype) for count in counts)
    if len(packable.shape) == 2:
        return layouts[0]
    stored = {piece.stored: piece.stored_shape for piece in pieces}
    return ExpertsLayout(layouts, abbreviated(stored, len(layouts)))


def _can_be_packed(packable: Packable, pieces: tuple[Piece, ...]) -> bool:
    """Whether a parameter is stored apart from others: a layer's as it is, for it keeps its stored name."""
    if len(packable.shape) == 3:
        return all(piece.whole for piece in pieces)
    return len(pieces) == 1 and pieces[0].alone and pieces[0].stored_shape == pieces[0].parameter_shape


def _renamed(names: Iterable[str], skeleton: PreTrainedModel, parameters: Parameters) -> bool:
    prefix = f"{skeleton.base_model_prefix}."
    for name in names:
        own, stored = (
            parameters.packables[name].parameter,
            parameters.pieces[parameters.packables[name].parameter][0].stored,
        )
        if stored not in (own, prefix + own, own.removeprefix(prefix)):
            return True
    return False


def _outside(skeleton: PreTrainedModel) -> dict[str, int]:
    """Matrices of experts that are not among what may be packed, by the class that keeps them."""
    outside: Counter[str] = Counter()
    for module in skeleton.modules():
        kind = type(module).__name__
        for weight in module.parameters(recurse=False):
            if "Expert" in kind and weight.dim() > 1 and not is_experts(module):
                outside[kind] += len(weight) if weight.dim() == 3 else 1
    return dict(outside)


class _Step(NamedTuple):
    """Some of a checkpoint's tensors that are written as others."""

    reads: list[str]
    convert: Callable[[], dict[str, Tensor]]
    """The others by name; they come where the first was."""


def _rewrite(checkpoint: Checkpoint, folder: Path, steps: Iterable[_Step], config: dict[str, Any]) -> None:
    """Fill a new folder with a checkpoint's tensors, some of them converted, and what lies beside them."""
    first, gone = {}, set()
    for step in steps:
        first[step.reads[0]] = step
        gone.update(step.reads)
    weight_map: dict[str, str] = {}
    total = 0
    for file in checkpoint.files:
        tensors: dict[str, Tensor] = {}
        for key in (key for key, home in checkpoint.file_of.items() if home == file):
            if key in first:
                new = first[key].convert()
            elif key in gone:
                continue
            else:
                new = checkpoint.load([key])
            for name in new.keys() & weight_map.keys():
                raise ValueError(f"'{checkpoint.folder}' would hold '{name}' twice: config.json is wrong")
            tensors |= new
            weight_map |= dict.fromkeys(new, file)
        if tensors:
            write_tensors(folder / file, tensors)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if checkpoint.files != [SINGLE]:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    copy_companions(checkpoint.folder, folder, replaced={"config.json", "README.md"})
    if (checkpoint.folder / RECORD).is_file():
        copy_file(checkpoint.folder / RECORD, folder / RECORD)
    write_json(folder / "config.json", config)
