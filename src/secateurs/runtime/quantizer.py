"""Tells transformers how to load and save compressed models: imported by `secateurs`, for its side effect.

transformers calls every weight format a quantisation. `config.json` names the format and promises the length
of every packed weight, so that the model can be laid out, and the files checked against it, before a byte of
weights is read. Weights stay memory-mapped; nothing dense is ever made.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateurs.runtime.format import VERSION, Layout
from secateurs.runtime.linear import SparseLinear

METHOD = "secateurs"
# In config.json this is `transformers_weights`, a place for the name of the weight file. It is none, so
# transformers refuses the folder, whatever it was asked for; the quantizer takes it away again.
GUARD = "none: these weights are packed, and load after `import secateurs`"


@register_quantization_config(METHOD)
class SecateursConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    Args:
        version: of the format.
        layers: name of the linear module -> its entry (see `Layout.to_json`).

    Raises:
        ValueError: an unknown version, an unknown field or a malformed entry.
    """

    def __init__(
        self, version: Any = None, layers: Any = None, quant_method: str = METHOD, **unknown: Any
    ) -> None:
        if version != VERSION or type(version) is not int:
            raise ValueError(
                f"compressed format version {version!r} is not known; this secateurs reads {VERSION}"
            )
        if not isinstance(layers, dict) or unknown:
            raise ValueError(
                "a compressed model's quantization_config needs 'version' and 'layers', and nothing else"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # an open set of names, typed as an enum
        self.version = version
        self.layers = {name: Layout.from_json(name, entry) for name, entry in layers.items()}

    def to_dict(self) -> dict[str, Any]:
        layers = {name: layout.to_json() for name, layout in self.layers.items()}
        return {"quant_method": self.quant_method, "version": self.version, "layers": layers}


OWN_WORDS = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}
"""Linear layers whose classes write the same product in their own words."""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes W x + b of its weight and bias, and nothing else."""
    kind = type(module)
    if kind is nn.Linear or (kind.__module__, kind.__name__) in OWN_WORDS:
        return True
    # torch's attention multiplies by the weight of such a layer without calling it.
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and kind.forward is nn.Linear.forward
    )


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Module name -> (rows, columns) of the linear layers that may be compressed.

    Not those that share their weight with the embedding, which is read by row and not multiplied.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    shapes = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in tied:
            continue
        if is_plain_linear(module):
            assert isinstance(module, nn.Linear)
            shapes[name] = (module.out_features, module.in_features)
        elif type(module) is Conv1D:
            shapes[name] = (module.nf, module.nx)
    return shapes


def module_name(key: str, names: Any, model: PreTrainedModel) -> str | None:
    """The one of `names` that a file or a config calls `key`, with or without the bare model's prefix."""
    prefix = f"{model.base_model_prefix}."
    for name in (key, prefix + key, key.removeprefix(prefix)):
        if name in names:
            return name
    return None


@register_quantizer(METHOD)
class SecateursQuantizer(HfQuantizer):
    """Puts `SparseLinear` modules where a compressed model has packed weights, and checks what they load."""

    quantization_config: SecateursConfig

    def __init__(self, quantization_config: SecateursConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError("only a compressed folder loads compressed: write one with `secateurs compress`")

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before the weight files are looked for, and so the place to lift the guard."""
        if getattr(config, "transformers_weights", None) == GUARD:
            del config.transformers_weights
        return config

    update_tp_plan = update_attn_implementation  # as it was called there before

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        layouts = matching_layers(self.quantization_config.layers, model, checkpoint_files or [])
        self.quantization_config.layers = layouts  # of a bare model, all that it can save again
        for name, layout in layouts.items():
            dense = model.get_submodule(name)
            has_bias = getattr(dense, "bias", None) is not None
            with torch.device("meta"):
                packed = SparseLinear(layout, has_bias, next(dense.parameters()).dtype)
            packed.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # or it would be drawn at random
            model.set_submodule(name, packed)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                if module.weight.is_meta:
                    raise ValueError(
                        f"compressed layer '{name}' cannot be offloaded; give a device_map that fits"
                    )
                module.count(name)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Its compressed weights are frozen, but gradients pass through: adapters train."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def matching_layers(
    layers: dict[str, Layout], model: PreTrainedModel, files: Iterable[str | Path]
) -> dict[str, Layout]:
    """Compares what the config promises with the model and its files' headers, before weights are read.

    Args:
        layers: from the config.
        model: without weights, and not yet changed.
        files: its safetensors.

    Returns:
        Module name -> layout. A bare model has no head, so the head's is left out.

    Raises:
        ValueError: a layer is not in the model or of another shape there; a packed weight is missing, has
            another length or dtype, or is not in the config.
    """
    shapes = linear_shapes(model)
    whole = hasattr(model, model.base_model_prefix)
    matching = {}
    for key, layout in layers.items():
        name = module_name(key, shapes, model)
        if name is None:
            if whole:
                raise ValueError(f"compressed layer '{key}' is not a linear layer of {type(model).__name__}")
            continue
        if shapes[name] != (layout.rows, layout.columns):
            shape = (layout.rows, layout.columns)
            raise ValueError(f"compressed layer '{key}' is {shape}, but the model's is {shapes[name]}")
        matching[name] = layout
    missing = set(layers)
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                if not key.endswith(".weight"):
                    continue
                found = (shard.get_slice(key).get_dtype(), shard.get_slice(key).get_shape())
                name = module_name(key.removesuffix(".weight"), layers, model)
                if name is None and found[0] == "U8":
                    raise ValueError(f"'{key}' in '{file}' is packed, but config.json does not say how")
                if name is not None:
                    missing.discard(name)
                    promised = ("U8", [layers[name].bytes])
                    if found != promised:
                        raise ValueError(f"'{key}' in '{file}' should be {promised}, but is {found}")
    if missing:
        raise ValueError(f"compressed layer '{min(missing)}' has no weight in the model's files")
    return matching
