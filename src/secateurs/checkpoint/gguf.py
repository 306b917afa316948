"""A .gguf file, llama.cpp's format, as an ordinary model folder.

transformers reads it: configuration, tokenizer with its chat template, and weights, no longer quantised. That
is done once, into the hub's cache; from then on it is a folder like any other. What transformers would leave
out without a word, and so make another model of, is put in here or refused.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import ModelCardData, constants
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateurs.checkpoint.config import check_causal, model_class, quiet, short
from secateurs.checkpoint.output import MARGIN_BYTES, check_space, new_folder
from secateurs.checkpoint.writing import write_text
from secateurs.finite import all_finite

FORMAT = 1
"""Of what is made of a file: a folder of an earlier one is not used again."""

PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")

SIZES = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Of the metadata, those that transformers takes to be one model's of the architecture."""

ROPE_FACTORS = "rope_freqs.weight"

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""How Llama 3.1 and its successors scale their rotary frequencies, but for the factor."""


def gguf_file(path: Path) -> Path | None:
    """The .gguf file that a path means: itself, or the only one in a folder without other weights.

    Raises:
        ValueError: the folder holds several, or the file is one of the parts of a model.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if (path.is_file() and path.suffix != ".gguf") or not files or any(path.glob("*.safetensors")):
        return None
    for file in files:
        if part := PART.search(file.name):
            raise ValueError(_one_of(file, int(part[1])))
    if len(files) > 1:
        names = ", ".join(f"'{file.name}'" for file in files)
        raise ValueError(f"'{path}' holds several models ({names}): give one of these files")
    return files[0]


def unpacked_folder(file: Path) -> Path:
    """The model folder that a .gguf file is unpacked into, in the hub's cache; the first call makes it.

    Weights are in bfloat16, those of a file in float32 in float32. The folder is there as a whole or not at
    all, and of several processes one makes it while the others wait. It may be deleted when nobody reads it.

    Raises:
        ValueError: the file is broken, of an architecture that transformers does not read, or holds what
            transformers would leave out.
        OSError: the cache cannot be written, or the disk is too small.
    """
    stat = file.stat()
    identity = [FORMAT, transformers_version, str(file.resolve()), stat.st_size, stat.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = Path(constants.HF_HOME) / "secateurs" / f"{file.stem}-{digest[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock").acquire()
    except OSError as error:
        raise OSError(
            f"'{file}' cannot be unpacked into '{folder.parent}' ({error.strerror or error}): set HF_HOME "
            "to a folder that can be written"
        ) from None
    with lock:
        if not folder.is_dir():
            with new_folder(folder) as unfinished:
                _unpack(file, unfinished, folder)
                mode = (unfinished / "README.md").stat().st_mode
                for path in unfinished.iterdir():
                    path.chmod(mode)  # safetensors makes files that only their owner can read
                    # So that a run knows its model again in a folder that was made anew.
                    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    return folder


def _unpack(file: Path, folder: Path, place: Path) -> None:
    """Fill a new folder, which is going to `place`."""
    with TemporaryDirectory() as scratch, _readable(file, scratch), quiet():
        from transformers.integrations.gguf import read_gguf_metadata

        # In a folder by itself: transformers would also read what lies beside it.
        link = Path(scratch) / "model.gguf"
        link.symlink_to(file.resolve())
        source: dict[str, Any] = {"pretrained_model_name_or_path": scratch, "gguf_file": link.name}
        metadata, names = read_gguf_metadata(str(link))
        architecture = metadata["general.architecture"]
        if metadata.get("split.count", 1) > 1:
            raise ValueError(_one_of(file, metadata["split.count"]))
        read = AutoConfig.from_pretrained(**source)
        check_causal(read, f"'{file}'", architecture)
        config = _completed(read, metadata, names, file)
        kind, config = model_class(config)
        with torch.device("meta"):
            skeleton = kind(config)
        _check_all_read(names, skeleton, architecture, file)
        dtype = torch.float32 if _is_float32(file) else torch.bfloat16
        weights_bytes = sum(tensor.numel() for tensor in skeleton.parameters()) * dtype.itemsize
        check_space(place, weights_bytes + MARGIN_BYTES, f"'{file}', unpacked,")
        if "tokenizer.ggml.model" in metadata:
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        _weights(kind, config, source, dtype, file).save_pretrained(folder)
    write_text(folder / "README.md", f"---\n{_card(metadata).to_yaml()}\n---\n")


def _one_of(file: Path, count: int) -> str:
    return f"'{file}' is one of {count} parts of a model: join them first (llama-gguf-split --merge)"


@contextmanager
def _readable(file: Path, scratch: str) -> Iterator[None]:
    """Whatever transformers stumbles over becomes one line that names the file, not its link in `scratch`."""
    try:
        yield
    except Exception as error:  # the reader, numpy and the model's code each raise their own
        if str(error).startswith(f"'{file}'") or getattr(error, "errno", None) is not None:
            raise
        reason = short(error).replace(f"{scratch}/model.gguf", file.name)
        raise ValueError(f"'{file}' cannot be unpacked ({reason})") from error


def _weights(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    source: dict[str, Any],
    dtype: torch.dtype,
    file: Path,
) -> PreTrainedModel:
    """The model, of weights that are numbers, and all there."""
    from transformers import GgufConfig

    loader: Any = kind
    model, report = loader.from_pretrained(
        **source,
        config=config,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[what]:
            raise ValueError(
                f"'{file}' does not hold what its metadata describe ({what}: {min(report[what])})"
            )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"'{file}' holds NaN or Inf ('{name}')")
    model.config.name_or_path = ""
    return model


def _completed(
    config: PretrainedConfig, metadata: dict[str, Any], names: tuple[str, ...], file: Path
) -> PretrainedConfig:
    """The configuration that transformers makes of the metadata, with what it leaves out there."""
    fields = _shortest(config.to_dict())
    for name in ("_model_name_or_path", "_name_or_path", "quantization_config"):
        fields.pop(name, None)
    architecture = metadata["general.architecture"]
    for key, name in SIZES.items():
        if name in fields and "global_head_dim" not in fields:  # Gemma 4's key_length is that one
            fields[name] = metadata.get(f"{architecture}.{key}", fields[name])
    # llama.cpp's own rule for Gemma: of the sizes only 27B scales by another width than that of a head.
    if "query_pre_attn_scalar" in fields:
        of_27b = fields["num_hidden_layers"] == {"gemma2": 46}.get(fields["model_type"], 62)
        width = fields["hidden_size"] // fields["num_attention_heads"] if of_27b else fields["head_dim"]
        fields["query_pre_attn_scalar"] = width

    rope = fields.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)  # Gemma 3's: of its two kinds of layers only those are scaled
    prefix = f"{architecture}.rope"
    scaling = metadata.get(
        f"{prefix}.scaling.type", "linear" if f"{prefix}.scale_linear" in metadata else "none"
    )
    if scaling == "linear":
        factor = metadata.get(f"{prefix}.scaling.factor", metadata.get(f"{prefix}.scale_linear"))
        rope |= {"rope_type": "linear", "factor": _shortest(factor)}
    elif scaling not in ("none", rope.get("rope_type")):
        raise ValueError(
            f"'{file}' scales its rotary positions by '{scaling}', which transformers does not read"
        )
    completed = type(config).from_dict(fields)
    if ROPE_FACTORS in names:
        fields["rope_parameters"] = rope | LLAMA3 | {"factor": float(_rope_factors(file).max())}
        completed = type(config).from_dict(fields)
        plain = rope["rope_theta"] ** -(torch.arange(0, fields["head_dim"], 2) / fields["head_dim"])
        factors = plain / ROPE_INIT_FUNCTIONS["llama3"](completed, torch.device("cpu"))[0]
        if not torch.allclose(factors, _rope_factors(file), rtol=1e-3):
            raise ValueError(
                f"'{file}' scales its rotary positions otherwise than Llama 3, which is not read"
            )
    return completed


def _rope_factors(file: Path) -> Tensor:
    """What llama.cpp divides rotary frequencies by, (head / 2)."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    return torch.from_numpy(next(tensor.data.copy() for tensor in tensors if tensor.name == ROPE_FACTORS))


def _shortest(value: Any) -> Any:
    """Numbers that went through float32, as people write them: 1e-05 instead of 9.999999747378752e-06."""
    if isinstance(value, dict):
        return {key: _shortest(part) for key, part in value.items()}
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _is_float32(file: Path) -> bool:
    from transformers.integrations.gguf import GgufHeader

    try:
        return GgufHeader.from_file(str(file)).dtype == torch.float32
    except ValueError:  # blocks of a kind that only the gguf package knows
        return False


def _check_all_read(names: tuple[str, ...], skeleton: PreTrainedModel, architecture: str, file: Path) -> None:
    """Raises ValueError if there are tensors that transformers would leave out."""
    from transformers.integrations.gguf import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if is_gguf_arch_supported(architecture):  # it reports itself what it leaves out
        return
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=skeleton.config.to_dict())
    read = {ROPE_FACTORS, *get_gguf_hf_weights_map(skeleton, processor)}
    # Experts' tensors are one parameter, whose name has no such end.
    left = next((name for name in names if not {name, name.removesuffix(".weight")} & read), None)
    if left is not None:
        raise ValueError(f"'{file}' holds '{left}', for which {type(skeleton).__name__} has no place")


def _card(metadata: dict[str, Any]) -> ModelCardData:
    """What of the metadata a model card has to take over."""
    source = str(metadata.get("general.base_model.0.repo_url", ""))
    return ModelCardData(
        license=metadata.get("general.license"),
        license_name=metadata.get("general.license.name"),
        license_link=metadata.get("general.license.link"),
        base_model=source.removeprefix("https://huggingface.co/") or None,
    )
