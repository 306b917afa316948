"""What of a block can be omitted: which rows and columns of its matrices belong to which head or channel.

All of it comes out of the derived anatomy, and none of it is trusted: `proof` runs a block of each kind.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateurs.anatomy import MLP, BlockAnatomy, Heads

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, Kind] = ("attention", "mlp")

NAMES: dict[Kind, str] = {"attention": "heads", "mlp": "channels"}
"""What the units of each kind are called."""


MULTIPLE = 8
"""Channels are kept in multiples of this, where the MLP's width is one: matrix units want aligned rows."""


@dataclass(frozen=True)
class Units:
    """What can be omitted of a block: `groups` groups of `size` units, of which each keeps as many."""

    groups: int
    size: int

    @property
    def count(self) -> int:
        return self.groups * self.size


def units_kept(kind: Kind, units: Units, rate: float) -> int:
    """How many units each group keeps at a rate; ValueError if that is none."""
    multiple = multiple_of(kind, units)
    keep = units.size - round(rate * units.size / multiple) * multiple
    if keep == 0:
        each = f" of each of its {units.groups} key-value heads" if units.groups > 1 else ""
        raise ValueError(
            f"rate {rate} leaves a layer none of the {units.size} {NAMES[kind]}{each}: choose a lower one"
        )
    return keep


def multiple_of(kind: Kind, units: Units) -> int:
    """Units are kept in multiples of this."""
    return math.gcd(MULTIPLE, units.size) if kind == "mlp" else 1


@dataclass(frozen=True)
class Numbers:
    """How many heads an attention has. Query head h reads key-value head `h // queries_per_key`."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def queries_per_key(self) -> int:
        """Query heads that read each key-value head."""
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """What all query heads are made of."""
        return self.heads * self.head_dim


COUNTS = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_key_value_groups": "queries_per_key",
    "embed_dim": "width",
    "hidden_size": "width",
    "split_size": "width",
}
"""What attention's code calls the numbers that it reads, where not from the shapes of its weights."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Where the units of one kind lie in a block."""

    units: Units
    writers: Mapping[str, Tensor]
    """Of each linear layer that makes what the units hand on, (outputs,): the unit that each output belongs
    to, or -1 if it is always kept."""
    reader: str
    """The linear layer (o, down) that reads it."""
    inputs: Tensor
    """(inputs of the reader,): the unit that each belongs to."""
    numbers: Numbers | None = None
    """Of the heads, where these are the units."""
    counts: Mapping[str, str] | None = None
    """Dotted path, within the block, of each attribute that holds one of `numbers` -> which one."""

    def counted(self, kept: int) -> dict[str, int]:
        """By path what these attributes hold if as many units are kept."""
        if self.numbers is None or self.counts is None:
            return {}
        whole = self.units.count == self.numbers.kv_heads
        heads = kept * self.numbers.queries_per_key if whole else kept
        numbers = replace(self.numbers, heads=heads, kv_heads=kept if whole else self.numbers.kv_heads)
        return {path: getattr(numbers, number) for path, number in self.counts.items()}


def cuts_of(block: nn.Module, inside: BlockAnatomy) -> dict[Kind, Cut]:
    """What a block seems to be made of that could be omitted; kinds that it has none of are left out."""
    cuts: dict[Kind, Cut] = {}
    if inside.heads is not None and inside.heads.count % inside.heads.kv_count == 0:
        cuts["attention"] = _attention(block, inside.heads)
    if (mlp := dense_mlp(inside)) is not None:
        cuts["mlp"] = _channels(mlp)
    return {kind: cut for kind, cut in cuts.items() if cut.units.size > 1 and _is_linear(block, cut)}


def dense_mlp(inside: BlockAnatomy) -> MLP | None:
    """The MLP that all tokens go through; the widest, if there are several."""
    dense = [mlp for mlp in inside.mlps if mlp.down.expert is None]
    return max(dense, key=lambda mlp: mlp.down.shape[1], default=None)


def _attention(block: nn.Module, heads: Heads) -> Cut:
    """Of grouped queries a unit is a key-value head with all its query heads; where there are fewer of those
    than query heads to each, it is a query head, and keys and values stay (they are small there).
    """
    numbers = Numbers(heads.count, heads.kv_count, heads.dim)
    whole = numbers.kv_heads >= numbers.queries_per_key
    units = Units(1, numbers.kv_heads) if whole else Units(numbers.kv_heads, numbers.queries_per_key)
    of_query = torch.arange(numbers.heads) // (numbers.queries_per_key if whole else 1)
    of_key = torch.arange(numbers.kv_heads) if whole else torch.full((numbers.kv_heads,), -1)
    writers: dict[str, Tensor] = {}
    for rows, unit in ((heads.query_rows, of_query), (heads.key_rows, of_key)):
        for name, head in rows.items():
            known = writers.get(name, torch.full_like(head, -1))
            # Row -1, the head of rows that belong to none, is added at the end of what is looked up.
            writers[name] = torch.maximum(known, torch.cat([unit, unit.new_tensor([-1])])[head])
    return Cut(
        units,
        writers,
        heads.reader,
        of_query[heads.columns],
        numbers,
        _counts(block, heads.reader.rpartition(".")[0], numbers),
    )


def _channels(mlp: MLP) -> Cut:
    width = mlp.down.shape[1]
    channels = torch.arange(width)
    # A fused layer holds gate's rows, then up's.
    writers = {matrix.name: channels.repeat(matrix.shape[0] // width) for matrix in mlp.first}
    return Cut(Units(1, width), writers, mlp.down.name, channels)


def _counts(block: nn.Module, owner: str, numbers: Numbers) -> dict[str, str]:
    attention: Any = block.get_submodule(owner)
    return {
        ".".join(filter(None, (owner, *inner, name))): number
        for inner, holder in (((), attention), (("config",), getattr(attention, "config", None)))
        for name, number in COUNTS.items()
        if _value(holder, name) == getattr(numbers, number)
    }


def _value(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:  # configurations refuse what layers differ in
        return None


def _is_linear(block: nn.Module, cut: Cut) -> bool:
    """Whether all of it lies in linear layers."""
    modules = dict(block.named_modules())
    return all(isinstance(modules.get(name), nn.Linear | Conv1D) for name in (*cut.writers, cut.reader))
