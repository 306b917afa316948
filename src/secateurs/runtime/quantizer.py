"""Tells transformers how to load and save compressed models: imported by `secateurs`, for its side effect.

transformers calls every weight format a quantisation. `config.json` names the format and promises the length
of every packed weight, so that the model can be laid out, and the files checked against it, before a byte of
weights is read. Weights stay memory-mapped; nothing dense is ever made.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateurs.checkpoint.names import PACKED_EXPERTS, own_names, packed_names
from secateurs.runtime.embedding import hold_table
from secateurs.runtime.experts import hold_packed
from secateurs.runtime.layout import VERSIONS, ExpertsLayout, Layout, read_layout
from secateurs.runtime.linear import Packed, SparseLinear
from secateurs.runtime.packable import own_parameters, packables

METHOD = "secateurs"
# In config.json this is `transformers_weights`, a place for the name of the weight file. It is none, so
# transformers refuses the folder, whatever it was asked for; the quantizer takes it away again.
GUARD = "none: these weights are packed, and load after `import secateurs`"


@register_quantization_config(METHOD)
class SecateursConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    Args:
        version: of the format.
        layers: name of a linear module, or of a parameter that holds experts -> its entry (see
            `Layout.to_json` and `ExpertsLayout.to_json`).

    Raises:
        ValueError: an unknown version, an unknown field or a malformed entry.
    """

    def __init__(
        self, version: Any = None, layers: Any = None, quant_method: str = METHOD, **unknown: Any
    ) -> None:
        if version not in VERSIONS or type(version) is not int:
            raise ValueError(
                f"compressed format version {version!r} is not known; this secateurs reads "
                f"{', '.join(map(str, VERSIONS))}"
            )
        if not isinstance(layers, dict) or unknown:
            raise ValueError(
                "a compressed model's quantization_config needs 'version' and 'layers', and nothing else"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # an open set of names, typed as an enum
        self.version = version
        self.layers = {name: read_layout(name, entry, version) for name, entry in layers.items()}

    def to_dict(self) -> dict[str, Any]:
        layers = {name: layout.to_json() for name, layout in self.layers.items()}
        return {"quant_method": self.quant_method, "version": self.version, "layers": layers}


@register_quantizer(METHOD)
class SecateursQuantizer(HfQuantizer):
    """Puts modules that hold packed weights where a compressed model has them, and checks what they load."""

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
        known = packables(model)
        heads = {head: layouts[name] for name in layouts if name in known for head in known[name].heads}
        for name, layout in (layouts | heads).items():
            packed: Packed
            with torch.device("meta"):
                if isinstance(layout, ExpertsLayout):
                    path, _, parameter = name.rpartition(".")
                    packed = hold_packed(model.get_submodule(path), parameter, layout)
                elif isinstance(dense := model.get_submodule(name), nn.Embedding):
                    packed = hold_table(dense, layout)
                else:
                    has_bias = getattr(dense, "bias", None) is not None
                    packed = SparseLinear(layout, has_bias, next(dense.parameters()).dtype)
                    model.set_submodule(name, packed)
            packed.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # or it would be drawn at random
            # Nor does what would draw the weights of its parts look at the shapes that these had. (A whole
            # model may have more to set: Falcon H1 has.)
            parent = model.get_submodule(name.rpartition(".")[0])
            holds_more = [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]
            if not holds_more and not isinstance(parent, PreTrainedModel):
                parent._is_hf_initialized = True  # type: ignore[assignment]
            if not isinstance(packed, nn.Embedding):  # Gemma's has a scale beside its table to set
                packed._is_hf_initialized = True  # type: ignore[assignment]
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, Packed):
                if module.weight.is_meta:
                    raise ValueError(
                        f"compressed layer '{name}' cannot be offloaded; give a device_map that fits"
                    )
                module.count(name)
        from secateurs.runtime.step import (
            step_by_step,
        )  # with transformers' models, so not before one is here

        step_by_step(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Its compressed weights are frozen, but gradients pass through: adapters train."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Which experts have tokens is not known beforehand."""
        return not any(
            isinstance(layout, ExpertsLayout) for layout in self.quantization_config.layers.values()
        )


def matching_layers(
    layers: Mapping[str, Layout | ExpertsLayout], model: PreTrainedModel, files: Iterable[str | Path]
) -> dict[str, Layout | ExpertsLayout]:
    """Compares what the config promises with the model and its files' headers, before weights are read.

    Args:
        layers: from the config.
        model: without weights, and not yet changed.
        files: its safetensors.

    Returns:
        What is packed of this model, by its own names -> layout. A bare model has no head, and a language
        model by itself no eyes, so their layers are left out.

    Raises:
        ValueError: a layer is not in the model or of another shape there; a packed weight is missing, has
            another length or dtype, or is not in the config.
    """
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                slice_ = shard.get_slice(key)
                found[key] = (file, slice_.get_dtype(), slice_.get_shape())
    more, known, others = packed_names(model), packables(model), own_parameters(model)
    promised = {packed_name(key, layout): key for key, layout in layers.items()}
    own = own_names(promised, model, more)
    stored = {name: key for key, name in own_names(found, model, more).items()}
    ours = {each.packed: name for name, each in known.items()}
    kind, parameters = type(model).__name__, model.state_dict()
    matching: dict[str, Layout | ExpertsLayout] = {}
    for packed, key in promised.items():
        layout, name = layers[key], ours.get(own[packed])
        apart = own[packed].removesuffix(PACKED_EXPERTS)
        if name is None and isinstance(layout, ExpertsLayout) and apart in others:
            shape = tuple(others[apart].shape)
            if shape not in storable(layout):
                raise ValueError(f"compressed layer '{key}' is {layout.shape}, but the model's is {shape}")
            matching[apart] = layout
        elif name is not None:
            if layout.shape != known[name].shape:
                raise ValueError(
                    f"compressed layer '{key}' is {layout.shape}, but the model's is {known[name].shape}"
                )
            if known[name].by_row and (layout.codes is None or layout.codes.masked):
                raise ValueError(
                    f"compressed layer '{key}' is an embedding: its values are codes without a mask"
                )
            matching[name] = layout
        elif own[packed] not in stored or own[packed] in parameters:
            raise ValueError(f"compressed layer '{key}' is not a linear layer of {kind}")
        if own[packed] not in stored:
            raise ValueError(f"compressed layer '{key}' has no weight in the model's files")
        there, wanted = stored[own[packed]], ("U8", [layout.bytes])
        file, *are = found[there]
        if tuple(are) != wanted:
            raise ValueError(f"'{there}' in '{file}' should be {wanted}, but is {tuple(are)}")
    for name in stored.keys() - own.values():
        key = stored[name]
        if found[key][1] == "U8" and key.endswith(".weight"):
            raise ValueError(f"'{key}' in '{found[key][0]}' is packed, but config.json does not say how")
    return matching


def storable(layout: ExpertsLayout) -> set[tuple[int, ...]]:
    """Shapes of a parameter that holds these experts in a model's own words: outputs or inputs first, experts
    a dimension or rows below each other. Which it is shows where it is multiplied by."""
    experts, rows, columns = layout.shape
    return {
        shape for r, c in ((rows, columns), (columns, rows)) for shape in ((experts, r, c), (experts * r, c))
    }


def packed_name(key: str, layout: Layout | ExpertsLayout) -> str:
    """What a model's packed weight is called, of the layer or experts called `key`."""
    return f"{key}{PACKED_EXPERTS if isinstance(layout, ExpertsLayout) else '.weight'}"
