"""Where nine families of models keep their blocks, attention heads and MLP channels, written down by hand.

What the library derives is held against it (`anatomy/test_anatomy.py`); and every claim of the table itself
against what real models do with their layers (`anatomy/test_families.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""What an output of a linear layer is. An MLP without a gate has `up` and `down` only."""


class UnsupportedArchitectureError(ValueError):
    """The model belongs to no family in the table."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model's blocks. Query head h reads key-value head `h // (heads // kv_heads)`."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int  # not hidden / heads in every model
    channels: int  # width of the MLP

    @property
    def queries_per_key(self) -> int:
        """Query heads that read each key-value head."""
        return self.heads // self.kv_heads

    @property
    def query_width(self) -> int:
        """Outputs of q, and inputs of o."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Projection:
    """A linear layer of a block, and what its outputs are."""

    name: str
    """Dotted path within the block."""

    roles: tuple[Role, ...]
    """More than one where the layer is fused: its rows are these parts, one after the other."""

    interleaved: bool = False
    """The parts take turns head by head: q, k, v of the first head, then of the second, and so on."""

    def split(self, rows: Tensor, sizes: Sizes) -> dict[Role, Tensor]:
        """Split what lies along the layer's outputs into its parts, without copying.

        The weight split gives the weights of each part, the bias its biases, and `torch.arange(out)` the
        row numbers.

        Args:
            rows: the layer's `linear_weight` (out, in), its bias (out,), or anything else (out, ...).
            sizes: of the model that the layer belongs to.

        Returns:
            A view for each role: q (heads, head_dim, ...), k and v (kv_heads, head_dim, ...), gate and up
            (channels, ...), o and down (hidden, ...).
        """
        if self.interleaved:
            by_head = rows.unflatten(0, (sizes.heads, len(self.roles), sizes.head_dim))
            return {role: by_head[:, i] for i, role in enumerate(self.roles)}
        shapes: dict[Role, tuple[int, ...]] = {
            "q": (sizes.heads, sizes.head_dim),
            "k": (sizes.kv_heads, sizes.head_dim),
            "v": (sizes.kv_heads, sizes.head_dim),
            "o": (sizes.hidden,),
            "gate": (sizes.channels,),
            "up": (sizes.channels,),
            "down": (sizes.hidden,),
        }
        parts: dict[Role, Tensor] = {}
        start = 0
        for role in self.roles:
            size = math.prod(shapes[role])
            parts[role] = rows.narrow(0, start, size).unflatten(0, shapes[role])
            start += size
        assert start == len(rows), f"{self.name} has {len(rows)} rows, its parts have {start}"
        return parts


Groups = tuple[tuple[Projection, ...], ...]
"""Groups of linear layers that share one input, in the order of the forward pass."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: what `transformers` calls the parts of its blocks."""

    blocks: str
    """Dotted path of the list of blocks within the model for causal language modelling."""

    attention: Groups
    """The layers that make q, k and v; then o, whose inputs are the heads (heads * head_dim) in order."""

    mlp: Groups
    """The layers that make gate and up; then down, whose inputs are the channels in order."""

    activation: str = "hidden_act"
    """The configuration's field that names the function applied to gate (to up where there is no gate)."""

    channels: str = "intermediate_size"
    """The configuration's field that holds the width of the MLP."""

    normalised: bool = False
    """What o and down give is normalised before it is added to what came in."""

    counts: Mapping[str, str] = field(default_factory=dict)
    """What a block's code reads its head counts from, where not from the shapes of its weights: dotted path
    of an attribute within the block, and the field of `Sizes` that it holds."""

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names within a block of the layers that share an input, in the order of the forward pass."""
        return tuple(tuple(layer.name for layer in group) for group in self.attention + self.mlp)

    @property
    def roles(self) -> dict[Role, Projection]:
        """The linear layer that holds each role; `"gate" in family.roles` says whether the MLP is gated."""
        return {role: layer for group in self.attention + self.mlp for layer in group for role in layer.roles}

    def adds(self, config: PretrainedConfig) -> bool:
        """Whether a block's result is its input plus what o gives plus what down gives, and nothing else."""
        return not self.normalised and getattr(config, "do_layer_norm_before", True)

    def sizes(self, config: PretrainedConfig) -> Sizes:
        """Read the sizes of a model of this family from its configuration."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        return Sizes(
            hidden=hidden,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            channels=getattr(config, self.channels) or 4 * hidden,  # GPT-2 leaves it out
        )


def family_of(config: PretrainedConfig) -> Family:
    """Look up the family that a model belongs to.

    Raises:
        UnsupportedArchitectureError: if the table has no entry for the configuration's `model_type`.
    """
    if config.model_type not in FAMILIES:
        classes = f" ({', '.join(config.architectures)})" if config.architectures else ""
        raise UnsupportedArchitectureError(
            f"unsupported architecture: {config.model_type!r}{classes}; supported: "
            f"{', '.join(sorted(FAMILIES))}. To add it, describe its blocks in the table of "
            "secateurs/anatomy/families.py."
        )
    return FAMILIES[config.model_type]


def linear_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in): a view, so that writing to it writes to the layer."""
    if isinstance(layer, Conv1D):  # GPT-2 stores (in, out)
        return layer.weight.T
    assert isinstance(layer, nn.Linear), f"not a linear layer: {layer}"
    return layer.weight


_LLAMA = Family(
    blocks="model.layers",
    attention=(
        (
            Projection("self_attn.q_proj", ("q",)),
            Projection("self_attn.k_proj", ("k",)),
            Projection("self_attn.v_proj", ("v",)),
        ),
        (Projection("self_attn.o_proj", ("o",)),),
    ),
    mlp=(
        (Projection("mlp.gate_proj", ("gate",)), Projection("mlp.up_proj", ("up",))),
        (Projection("mlp.down_proj", ("down",)),),
    ),
    counts={"self_attn.num_key_value_groups": "queries_per_key"},
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": replace(_LLAMA, activation="hidden_activation", normalised=True),
    "phi3": Family(
        blocks="model.layers",
        attention=(
            (Projection("self_attn.qkv_proj", ("q", "k", "v")),),
            (Projection("self_attn.o_proj", ("o",)),),
        ),
        mlp=(
            (Projection("mlp.gate_up_proj", ("gate", "up")),),
            (Projection("mlp.down_proj", ("down",)),),
        ),
        counts={
            "self_attn.num_key_value_groups": "queries_per_key",
            "self_attn.num_key_value_heads": "kv_heads",
            "self_attn.config.num_attention_heads": "heads",
        },
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        attention=(
            (
                Projection("self_attn.q_proj", ("q",)),
                Projection("self_attn.k_proj", ("k",)),
                Projection("self_attn.v_proj", ("v",)),
            ),
            (Projection("self_attn.out_proj", ("o",)),),
        ),
        mlp=((Projection("fc1", ("up",)),), (Projection("fc2", ("down",)),)),
        activation="activation_function",
        channels="ffn_dim",
        counts={"self_attn.num_heads": "heads"},
    ),
    "gpt2": Family(
        blocks="transformer.h",
        attention=((Projection("attn.c_attn", ("q", "k", "v")),), (Projection("attn.c_proj", ("o",)),)),
        mlp=((Projection("mlp.c_fc", ("up",)),), (Projection("mlp.c_proj", ("down",)),)),
        activation="activation_function",
        channels="n_inner",
        counts={"attn.split_size": "query_width"},
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        attention=(
            (Projection("attention.query_key_value", ("q", "k", "v"), interleaved=True),),
            (Projection("attention.dense", ("o",)),),
        ),
        mlp=(
            (Projection("mlp.dense_h_to_4h", ("up",)),),
            (Projection("mlp.dense_4h_to_h", ("down",)),),
        ),
    ),
}
