"""Mutates small compressed models, on disk, and loads them: a clean error or a right answer, nothing else.

A right answer is the product that an independent reading of the mutated file gives: numpy's bits, one by
one. Run as `python tools/fuzz_format.py`; ends with a count of each outcome, or with the first file that
broke the rule.
"""

import argparse
import json
import random
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.utils import logging

from secateurs.checkpoint.scales import write_scales
from secateurs.runtime.convert import compress
from secateurs.runtime.experts import SparseExperts
from secateurs.runtime.layout import Layout
from secateurs.runtime.linear import SparseLinear
from secateurs.runtime.load import load_model
from secateurs.values import Values

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    7,
    64,
    2**31 - 1,
    2**31,
    2**63,
    -(2**40),
    1.5,
    True,
    None,
    "8",
    "int4",
    "bfloat16",
    [],
    {},
]


SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 70,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "dense": LlamaConfig(**SIZES),
    "experts": Qwen3MoeConfig(**SIZES, moe_intermediate_size=70, num_experts=3, num_experts_per_tok=2),
    "codes": LlamaConfig(**SIZES | {"hidden_size": 72, "head_dim": 36}),
}
GRIDS = [Values(8, 64), Values(4, 32), Values(4, 64, "half"), Values(3, 64), Values(2, 32, "half"), Values(2)]


def small_model(folder: Path, kind: str) -> None:
    """Writes a compressed model of a few kilobytes, with awkward widths and rows without a weight."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data[torch.rand(weight.shape) < 0.6] = 0
            weight.data[..., 3, :] = 0
    scales = {} if kind != "codes" else dict(rounded(model))
    model.save_pretrained(folder / "dense")
    write_scales(folder / "dense", scales)
    compress(folder / "dense", folder / "compressed")


def rounded(model: PreTrainedModel) -> Iterator[tuple[str, tuple[Values, torch.Tensor]]]:
    """Puts the weights of linear layers on grids, in place; one matrix without zeros."""
    weights = {name: weight for name, weight in model.named_parameters() if "proj" in name}
    for (name, weight), values in zip(weights.items(), cycle(GRIDS), strict=False):
        rows, columns = weight.shape
        scales = torch.randn(rows, values.groups(columns)).bfloat16()
        codes = torch.randint(0, 2**values.bits, weight.shape, dtype=torch.uint8)
        kept = weight.data != 0 if "up_proj" not in name else torch.ones_like(weight, dtype=torch.bool)
        weight.data = values.decode(codes, scales).mul_(kept).add_(0.0).bfloat16()
        yield name, (values, scales)


def mutate_weights(data: bytes, rng: random.Random) -> bytes:
    """Truncates, extends, flips, overwrites, moves or edits the header of a safetensors file."""
    changed = bytearray(data)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    kind = rng.choice(["truncate", "extend", "flip", "flip header", "overwrite", "swap", "edit header"])
    if kind == "truncate":
        return data[: rng.randrange(len(data))]
    if kind == "extend":
        return data + rng.randbytes(rng.randrange(1, 100))
    if kind in ("flip", "flip header"):
        for _ in range(rng.choice([1, 1, 2, 8])):
            changed[rng.randrange(header if kind == "flip header" else len(data))] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        start = rng.randrange(header, len(data))
        length = min(rng.randrange(1, 64), len(data) - start)
        changed[start : start + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    elif kind == "swap":
        a, b = sorted(rng.sample(range(header, len(data)), 2))
        changed = changed[:a] + changed[b:] + changed[a:b]
    else:
        entries = json.loads(data[8:header])
        entry = entries[rng.choice([name for name in entries if name != "__metadata__"])]
        field = rng.choice(["dtype", "shape", "data_offsets"])
        if field == "dtype":
            entry["dtype"] = rng.choice(["U8", "I8", "BF16", "F16", "F32", "BOOL", "F8_E4M3"])
        else:
            numbers = entry[field]
            numbers[rng.randrange(len(numbers))] += rng.choice([-64, -8, -1, 1, 8, 64, 2**40])
        edited = json.dumps(entries).encode()
        return struct.pack("<Q", len(edited)) + edited + data[header:]
    return bytes(changed)


def mutate_settings(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Edits the quantization_config of a model's config."""
    config = json.loads(json.dumps(config))
    settings = config["quantization_config"]
    layers = settings["layers"]
    name = rng.choice(sorted(layers))
    kinds = ["number", "shape", "values", "drop", "rename", "field", "version", "swap", "stored", "codes"]
    kind = rng.choice(kinds)
    if kind == "number":
        counts, by = layers[name]["nonzeros"], rng.choice([-1, 1, 64])
        if isinstance(counts, list):
            changed = [*counts]
            changed[rng.randrange(len(changed))] += by
            counts = rng.choice([changed, counts[1:], [*counts, 1], [None, *counts[1:]], sum(counts)])
        else:
            counts += by
        layers[name]["nonzeros"] = rng.choice([*NUMBERS, *[counts] * 8])
    elif kind == "codes":
        field = rng.choice(["group", "grid", "mask", "bytes", "dtype", "values"])
        known = [32, 64, 128, "whole", "half", True, False, "int2", "int3", "int8", "float16"]
        layers[name][field] = rng.choice([*NUMBERS, *known * 2])
    elif kind == "stored":
        stored = rng.choice(
            [*NUMBERS, {"model.norm.weight": [24]}, {"a.*": [2**40, 2**40]}, {"a.*": NUMBERS}]
        )
        layers[name]["stored"] = stored
    elif kind == "shape":
        layers[name]["shape"] = rng.choice([*NUMBERS, layers[name]["shape"][::-1], [1, 2, 3]])
        if rng.random() < 0.5:
            layers[name]["shape"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
    elif kind == "values":
        layers[name]["values"] = rng.choice([*NUMBERS, "float16", "float32", "int8"])
    elif kind == "drop":
        del layers[name]
    elif kind == "rename":
        layers[rng.choice(["", "lm_head", "model", "model.embed_tokens", name + "x"])] = layers.pop(name)
    elif kind == "field":
        layers[name][rng.choice(["extra", "shape", "values", "nonzeros"])] = rng.choice(NUMBERS)
    elif kind == "version":
        settings[rng.choice(["version", "layers", "other"])] = rng.choice(NUMBERS)
    else:
        other = rng.choice(sorted(layers))
        layers[name], layers[other] = layers[other], layers[name]
    return config


def plain_weight(packed: np.ndarray, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """W (rows, columns) of a packed weight in float32, read bit by bit; and what sums of floats go up to."""
    width = -(-layout.columns // 64) * 64
    kept, begin = np.ones((layout.rows, width), bool), 0
    if layout.masked:
        begin = layout.rows * width // 8
        mask = packed[:begin].reshape(layout.rows, width // 8)
        kept = np.unpackbits(mask, axis=1, bitorder="little").astype(bool)
    if layout.codes is None:
        kept = kept[:, : layout.columns]
        values = packed[begin:][: layout.dtype.itemsize * kept.sum()].copy()
        dense = np.zeros(kept.shape, np.float32)
        dense[kept] = torch.from_numpy(values).view(layout.dtype).float().numpy()
        return torch.from_numpy(dense), torch.from_numpy(dense).abs()
    values, levels = layout.codes.values, np.zeros(kept.shape, np.float32)
    for row in range(layout.rows):
        codes, size = row_of_codes(packed[begin:], kept[row], values)
        levels[row, kept[row]] = codes.astype(np.int64) * values.step + values.lowest
        begin += size
    groups = values.groups(layout.columns)
    scales = torch.from_numpy(packed[begin : begin + 2 * layout.rows * groups].copy()).view(torch.bfloat16)
    wide = values.spread(scales.float().view(layout.rows, groups), layout.columns)
    return torch.from_numpy(levels[:, : layout.columns]) * wide, wide.abs() * -values.lowest


def row_of_codes(packed: np.ndarray, kept: np.ndarray, values: Values) -> tuple[np.ndarray, int]:
    """The codes that a row keeps, in order, and how many bytes they take."""
    if values.bits == 4:
        odd = np.flatnonzero(kept) // max(values.group, 64) % 2 == 1
        codes, size = np.zeros(len(odd), np.uint8), max(int((~odd).sum()), int(odd.sum()))
        codes[~odd] = packed[: int((~odd).sum())] & 15
        codes[odd] = packed[: int(odd.sum())] >> 4
        return codes, size
    found, size = [], 0
    for word in kept.reshape(-1, 64):
        count = int(word.sum())
        length = -(-count * values.bits // 8)
        number = int.from_bytes(packed[size : size + length].tobytes(), "little")
        found += [number >> values.bits * i & (1 << values.bits) - 1 for i in range(count)]
        size += length
    return np.array(found, np.uint8), size


def outcome(folder: Path) -> str:
    """Loads a folder: 'refused' or 'right'. Any other exception, or a wrong product, is an AssertionError."""
    try:
        model = load_model(folder, "cpu")
    except ValueError:
        return "refused"
    file = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        products: list[tuple[Layout, int, Callable[[torch.Tensor], torch.Tensor]]] = []
        if isinstance(module, SparseLinear):
            products = [(module.layout, 0, module)]
        elif isinstance(module, SparseExperts):
            begin = 0
            for i, layout in enumerate(module.layout.layouts):
                products.append((layout, begin, partial(module.linear, i, bias=None)))
                begin += -(-layout.bytes // 64) * 64
        for layout, begin, product in products:
            weight, most = plain_weight(file[f"{name}.weight"].numpy()[begin:], layout)
            x = torch.randn(2, layout.columns)
            size = x.abs().double() @ most.double().T
            tolerance = 1e-5 * size + 1e-35
            if layout.codes is not None:  # its products round activations, to a 127th of the largest
                tolerance += 0.004 * x.abs().max() * weight.double().abs().sum(dim=1)
                tolerance += 0.004 * size  # the dense weight's own dtype is less precise
            right = (product(x).double() - x.double() @ weight.double().T).abs() <= tolerance
            # A flipped exponent may take a sum beyond float32, or make a weight NaN.
            assert (right | ~(size < 1e38)).all(), f"'{name}' is computed wrongly"
    return "right"


def fuzz(files: int, seed: int = 0, kind: str = "dense") -> Counter[str]:
    """Counts outcomes over mutated files; the first that breaks the rule is left in the working directory.

    Args:
        files: how many.
        seed: of what is changed.
        kind: of CONFIGS.
    """
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        small_model(Path(scratch), kind)
        folder = Path(scratch) / "compressed"
        assert outcome(folder) == "right"
        weights, config = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()
        for number in range(files):
            if rng.random() < 0.7:
                (folder / "model.safetensors").write_bytes(mutate_weights(weights, rng))
            else:
                (folder / "config.json").write_text(json.dumps(mutate_settings(json.loads(config), rng)))
            try:
                counts[outcome(folder)] += 1
            except BaseException:
                shutil.copytree(folder, f"fuzz-failure-{number}")
                raise
            (folder / "model.safetensors").write_bytes(weights)
            (folder / "config.json").write_text(config)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[*CONFIGS], default="dense")
    arguments = parser.parse_args()
    print(dict(fuzz(arguments.files, arguments.seed, arguments.kind)))
