"""What `config.json` says, as transformers understands it, or one line that says why it does not.

Every place that reads a configuration reads it here, so that all verbs take and refuse the same folders.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import __version__ as transformers_version
from transformers.integrations import deepspeed
from transformers.utils import logging

from secateurs.checkpoint.reading import Checkpoint
from secateurs.checkpoint.writing import write_json

COMPRESSED = "secateurs"
"""What `quantization_config` calls this library's own format."""

PACKED = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".bitmask", ".SCB", ".absmax", ".scales")
"""Ends of the names of what stands beside or for a quantised weight."""

LONGEST = 160
"""Characters that are kept of an error of transformers, some of which list every model that there is."""


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of a causal model, with or without eyes, dense or compressed, ready to build it from.

    What the language model is like (positions, vocabulary, sizes) an image-text model's says in a part of its
    own, which `config.get_text_config(decoder=True)` gives; of any other model it is the whole.

    An attention implementation that has to be installed first, FlashAttention say, is what the model was
    trained with and not what it is: it is left to transformers to choose one (sdpa, or eager).

    Raises:
        ValueError: transformers cannot read it, it is of no causal language model, or of quantised weights.
    """
    refuse_quantised(checkpoint)
    where = f"'{checkpoint.folder / 'config.json'}'"
    kind = checkpoint.config.get("model_type")
    try:
        with quiet():
            config = _as_transformers_reads_it(checkpoint)
    except Exception as error:  # a wrong value comes out as whatever the model's code stumbles over
        if checkpoint.config.get("auto_map") and "trust_remote_code" in str(error):
            reason = "it comes with code of its own, which is not run"
        elif not isinstance(kind, str):
            reason = "it has to name the model_type"
        elif f"model type `{kind}`" in str(error):
            reason = f"version {transformers_version} does not know it"
        else:
            reason = short(error)
        raise ValueError(f"transformers cannot read {where} ({kind}): {reason}") from error
    check_causal(config, where, str(kind))
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None
    return config


def _as_transformers_reads_it(checkpoint: Checkpoint) -> PretrainedConfig:
    config: PretrainedConfig
    if not checkpoint.edited:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        return config
    with TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", checkpoint.config)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def check_causal(config: PretrainedConfig, where: str, kind: str) -> None:
    """Raises ValueError, which says where the configuration is from, if it is of no causal language model."""
    if not reads_images(config) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{where} does not describe a causal language model ({kind})")


def reads_images(config: PretrainedConfig) -> bool:
    """Whether a configuration is of an image-text model around a decoder, such as Gemma 3 or Qwen3-VL."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not config.is_encoder_decoder


def model_class(config: PretrainedConfig) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """What a configuration's weights are of: the class, and the part of the configuration that goes into it.

    An image-text model is what AutoModelForImageTextToText makes of it, whole: AutoModelForCausalLM does not
    know most of them, and of some (Qwen3.5, Llama 4) it makes the language model alone, under other names.
    Of all others it is what AutoModelForCausalLM makes of them.
    """
    kind: Any
    if reads_images(config):
        kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        return kind, config
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    text = config.get_text_config()
    if text is config or getattr(kind, "config_class", None) is not type(text):
        return kind, config
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return kind, text


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether the folder is in this library's own format."""
    settings = checkpoint.config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == COMPRESSED


def refuse_quantised(checkpoint: Checkpoint, *, compressed: bool = False) -> None:
    """Quantised weights are no weights to prune, inspect, train or measure by.

    Args:
        checkpoint: the model's files.
        compressed: refuse this library's own format too.

    Raises:
        ValueError: the configuration or the names of the tensors say that they are quantised, and how.
    """
    folder, config = checkpoint.folder, checkpoint.config
    if is_compressed(checkpoint):
        if compressed:
            raise ValueError(
                f"'{folder}' is compressed: secateurs decompress makes an ordinary folder of it first"
            )
        return
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if part.get(key):
                raise ValueError(
                    f"'{folder}' holds quantised weights ({_method(part[key])}): "
                    "give the model as it was before quantising"
                )
    for name in checkpoint.file_of:
        if name.endswith(PACKED):
            raise ValueError(
                f"'{folder}' holds quantised weights ('{name}'): give the model as it was before quantising"
            )


def _method(settings: Any) -> str:
    """A quantisation's name in words."""
    if not isinstance(settings, dict):
        return "by a method that it does not name"
    names = [settings.get("quant_method"), settings.get("quant_type"), settings.get("format")]
    sparse = settings.get("sparsity_config")
    names.append(sparse.get("format") if isinstance(sparse, dict) else None)
    bits = settings.get("bits") or settings.get("w_bit")
    names.append(f"{bits} bits" if isinstance(bits, int) else None)
    return ", ".join(str(name) for name in names if isinstance(name, str)) or "by a method without a name"


def short(error: BaseException) -> str:
    """An error's first sentence or so, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " ..."


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' reports and bars stay silent: what is wrong is said in one line of our own."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """What transformers makes within is whole, though a Trainer's arguments ask for ZeRO-3, and linear layers
    are torch's own: under ZeRO-3 DeepSpeed replaces them for the whole process."""
    if "deepspeed" not in sys.modules:
        yield
        return
    before, linear = deepspeed._hf_deepspeed_config_weak_ref, functional.linear
    deepspeed.unset_hf_deepspeed_config()
    functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref, functional.linear = before, linear
