"""From a folder of dense weights to a compressed one, and back, shard by shard."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    read_json,
    resolve,
    write_json,
    write_tensors,
)
from secateurs.checkpoint.card import write_card
from secateurs.checkpoint.config import is_compressed
from secateurs.checkpoint.names import skeleton_of
from secateurs.checkpoint.pieces import take_apart
from secateurs.checkpoint.scales import read_scales, write_scales
from secateurs.runtime.format import Grid, pack, pack_experts, scales_of
from secateurs.runtime.layout import VERSION, VERSION_WITH_CODES, VERSION_WITH_EXPERTS, ExpertsLayout, Layout
from secateurs.runtime.parameters import Parameters
from secateurs.runtime.quantizer import GUARD, METHOD
from secateurs.runtime.settings import CompressSettings, DecompressSettings
from secateurs.runtime.survey import NothingWorthIt, survey
from secateurs.settings import takes
from secateurs.values import SCALES

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
        unpacked: other weights that have zeros enough, or were rounded, and cannot be packed: their shares of
            the bytes before.
        coded: how many of the compressed weights are of few bits each.
        moved: parameters that were rounded, but have been changed since, so that they are not.
    """

    layers: int
    dense_layers: int
    bytes_before: int
    bytes_after: int
    share: float
    experts: int = 0
    outside: Mapping[str, int] = field(default_factory=dict)
    unpacked: Mapping[str, float] = field(default_factory=dict)
    coded: int = 0
    moved: int = 0

    def __str__(self) -> str:
        experts = f" ({self.experts} of them experts')" if self.experts else ""
        outside = " and ".join(f"{count} of {kind}" for kind, count in self.outside.items())
        outside = f" ({outside} cannot be packed)" if outside else ""
        unpacked = ""
        if self.unpacked:
            names = [f"'{name}'" for name in self.unpacked][:3] + ["..."] * (len(self.unpacked) > 3)
            share = sum(self.unpacked.values())
            unpacked = f"; {share:.0%} are pruned or rounded too and cannot be packed: {', '.join(names)}"
        coded = f", {self.coded} as codes of a few bits" if self.coded else ""
        moved = f"; {self.moved} are off the grid that they were rounded to" if self.moved else ""
        return (
            f"{self.layers} layers compressed{experts}{coded}, {self.dense_layers} left dense{outside}; "
            f"{self.bytes_before / 1e6:.1f} MB became {self.bytes_after / 1e6:.1f} MB "
            f"({self.share:.0%} of the weights' bytes are packed){unpacked}{moved}"
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


def compressed_bytes(model: str | Path) -> int:
    """Bytes of all a model's tensors as `compress` would store them; as they are, where it has nothing to do.

    All weights are read, none written.

    Args:
        model: a model folder or a name on the Hugging Face hub, dense or compressed.
    """
    checkpoint = Checkpoint(resolve(model))
    if is_compressed(checkpoint):
        return checkpoint.tensor_bytes
    skeleton = skeleton_of(checkpoint)
    try:
        found = survey(checkpoint, skeleton, Parameters(checkpoint, skeleton), read_scales(checkpoint.folder))
    except NothingWorthIt:
        return checkpoint.tensor_bytes
    return checkpoint.tensor_bytes - sum(
        layout.dense_bytes - layout.bytes for layout in found.layouts.values()
    )


def _compress(model: str, checkpoint: Checkpoint, output: Path) -> Compression:
    check_output(output, checkpoint, 0)
    skeleton = skeleton_of(checkpoint)
    parameters = Parameters(checkpoint, skeleton)
    grids = read_scales(checkpoint.folder)
    if not grids and _was_rounded(checkpoint):
        warnings.warn(
            f"'{checkpoint.folder}' was rounded to few bits, but has no {SCALES}: its weights are packed as "
            "they are",
            stacklevel=4,
        )
    found = survey(checkpoint, skeleton, parameters, grids)
    layouts = found.layouts
    dense_bytes = sum(layout.dense_bytes for layout in layouts.values())
    packed_bytes = sum(layout.bytes for layout in layouts.values())
    check_output(output, checkpoint, checkpoint.bytes - dense_bytes + packed_bytes)

    def step(name: str) -> _Step:
        packable, layout = parameters.packables[name], layouts[name]
        pieces = parameters.pieces[packable.parameter]

        def packed() -> dict[str, Tensor]:
            matrices = packable.matrices_of(parameters.read(packable.parameter))
            grid = None if layout.codes is None else grids[packable.parameter]
            if isinstance(layout, ExpertsLayout):
                return {packable.packed: pack_experts(matrices, layout.stored, grid)[0]}
            return {pieces[0].stored: pack(matrices, grid, masked=False if packable.by_row else None)[0]}

        heads = [parameters.pieces[f"{head}.weight"] for head in packable.heads]
        reads = {piece.stored: None for some in (pieces, *heads) for piece in some}
        return _Step(list(reads), packed)

    layers = {name: layout.to_json() for name, layout in layouts.items()}
    coded = [name for name, layout in layouts.items() if layout.codes is not None]
    with_experts = any(isinstance(layout, ExpertsLayout) for layout in layouts.values())
    version = VERSION_WITH_EXPERTS if with_experts or found.renamed else VERSION
    version = VERSION_WITH_CODES if coded else version
    packing = {"quant_method": METHOD, "version": version, "layers": layers}
    config = {**checkpoint.config, "quantization_config": packing, "transformers_weights": GUARD}
    counts = {
        name: packable.count
        for name, packable in parameters.packables.items()
        if name in layouts or not packable.by_row
    }
    with new_folder(output) as folder:
        _rewrite(checkpoint, folder, map(step, layouts), config)
        done = Compression(
            layers=sum(counts[name] for name in layouts),
            dense_layers=sum(counts[name] for name in counts.keys() - layouts.keys())
            + sum(found.outside.values()),
            bytes_before=checkpoint.bytes,
            bytes_after=Checkpoint(folder).bytes,
            share=dense_bytes / checkpoint.tensor_bytes,
            experts=sum(counts[n] for n, layout in layouts.items() if isinstance(layout, ExpertsLayout)),
            outside=found.outside,
            unpacked=found.unpacked,
            coded=sum(counts[name] for name in coded),
            moved=len(found.moved),
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
    count = sum(parameters.packables[name].count for name in layouts)
    with new_folder(output) as folder:
        _rewrite(checkpoint, folder, map(step, layouts), config)
        grids = {
            parameters.packables[name].parameter: _grid(checkpoint.load([key])[key], layouts[name])
            for name, key in parameters.packed.items()
            if layouts[name].codes is not None
        }
        if grids:
            write_scales(folder, grids)
        write_card(
            folder,
            checkpoint.folder,
            model,
            title="decompressed",
            facts=[("Decompressed", f"{count} layers, which are dense again and keep their zeros")],
            usage="",
            tags=["sparse"],
        )


def _was_rounded(checkpoint: Checkpoint) -> bool:
    """Whether the record of the pruning says so."""
    file = checkpoint.folder / RECORD
    record = read_json(file) if file.is_file() else {}
    layers = record.get("layers")
    return bool(record.get("tables")) or (
        isinstance(layers, list)
        and any(isinstance(layer, dict) and layer.get("rounding") is not None for layer in layers)
    )


def _grid(packed: Tensor, layout: Layout | ExpertsLayout) -> Grid:
    """What a packed weight was rounded to."""
    assert layout.codes is not None
    if isinstance(layout, Layout):
        return layout.codes.values, scales_of(packed, layout)
    scales = [scales_of(layout.part(packed, i), one) for i, one in enumerate(layout.layouts)]
    return layout.codes.values, torch.stack(scales)


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
