"""Where a model's experts are: found by building it, on the meta device, with fewer of them.

Every parameter that becomes smaller has its experts along the side that does: their matrices and biases, the
router's rows, and whatever correction is added to them. No router is known by name.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from secateurs.anatomy.blocks import UnsupportedArchitectureError
from secateurs.checkpoint.cut import Side

NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of a block's experts."""

CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
"""What they call the number that a token goes to."""


@dataclass(frozen=True)
class Numbers:
    """What a configuration says of experts."""

    where: tuple[str, ...]
    """The names that lead to the part of the configuration that says so: ("text_config",), say, or none."""
    name: str
    """What the number of experts is called there."""
    count: int
    """Experts of a block."""
    chosen: int
    """A token goes to so many of them."""
    groups: int
    """Of consecutive experts, equally many, between which a router may choose first. Mostly 1."""
    chosen_groups: int

    def kept(self, share: float) -> int:
        """How many of a block's experts a share is: the nearest number that leaves groups of one size.

        Raises:
            ValueError: fewer than a token goes to.
        """
        size = self.count // self.groups
        each = round(share * size)
        # A router that chooses between groups may do so by the best two of each.
        least = max(-(-self.chosen // self.chosen_groups), min(2, size) if self.groups > 1 else 1)
        if each < least:
            groups = f", in {self.groups} groups," if self.groups > 1 else ""
            raise ValueError(
                f"experts {100 * share:.4g}% keeps {each * self.groups} of {self.count}{groups} where each "
                f"token goes to {self.chosen}: keep {least * self.groups} or more ({least / size:.1%})"
            )
        return each * self.groups

    def written(self, config: Mapping[str, Any], count: int) -> dict[str, Any]:
        """What `config.json` holds, with another number of experts under whatever names it has for it."""
        cut = deepcopy(dict(config))
        part = cut
        for key in self.where:
            part = part.setdefault(key, {})
        for name in {self.name, *(name for name in NUMBERS if part.get(name) == self.count)}:
            part[name] = count
        return cut


def numbers_of(config: PretrainedConfig) -> Numbers | None:
    """What a configuration says of experts; None if it has none.

    Raises:
        UnsupportedArchitectureError: it has different numbers of them in its blocks.
    """
    text = config.get_text_config(decoder=True)
    before = next(where for where, part in _parts(config) if part is text)
    for where, part in _parts(text, before):
        name = next((name for name in NUMBERS if getattr(part, name, None)), None)
        chosen = next((number for name in CHOSEN if (number := getattr(part, name, None))), None)
        if name is None or chosen is None or getattr(part, name) == 1:
            continue
        count = getattr(part, name)
        if not isinstance(count, int) or not isinstance(chosen, int):
            raise _cannot(f"{config.model_type!r} has different numbers of them in its blocks")
        groups = getattr(part, "n_group", None) or 1
        chosen_groups = getattr(part, "topk_group", None) or groups
        return Numbers(where, name, count, chosen, groups, min(groups, chosen_groups))
    return None


def _parts(
    config: PretrainedConfig, where: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], PretrainedConfig]]:
    """A configuration and those within it, each with the names that lead there."""
    found = [(where, config)]
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found += _parts(value, (*where, name))
    return found


def sides_of(
    dense: PreTrainedModel, cut: PreTrainedModel, path: str, numbers: Numbers, kept: int
) -> dict[str, Side]:
    """Where experts lie in the parameters and stored buffers of a model, by their names. Nowhere, where the
    configuration speaks of experts that the model does not have.

    Args:
        dense: the model, of which only shapes matter.
        cut: the same of a configuration with fewer experts.
        path: of the list of its blocks.
        numbers: of experts, in the one.
        kept: how many each block has in the other.

    Raises:
        UnsupportedArchitectureError: a router has not one row for each expert, or what becomes smaller does
            not do so by so many experts along one side. Names it.
    """
    before, after = (
        {name: tuple(x.shape) for name, x in model.state_dict().items()} for model in (dense, cut)
    )
    sides: dict[str, Side] = {}
    for name, old in before.items():
        new = after.get(name, ())
        if old == new:
            continue
        block = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
        axes = [axis for axis, size in enumerate(old) if new[axis : axis + 1] != (size,)]
        side = None
        if block and len(old) == len(new) and len(axes) == 1:
            side = _side(int(block[1]), axes[0], old, new, numbers.count, kept)
        if side is None:
            raise _cannot(f"with {kept} of {numbers.count} '{name}' is {new} and not {old}")
        sides[name] = side
    _check_routers(dense, before, sides)
    return sides


def _side(
    block: int, axis: int, old: tuple[int, ...], new: tuple[int, ...], experts: int, kept: int
) -> Side | None:
    each, rest = divmod(old[axis], experts)
    if not rest and new[axis] == each * kept:
        return Side(block, axis, old[axis], experts, each)
    return Side(block, axis, old[axis], experts, 1) if old[axis] - new[axis] == experts - kept else None


def _check_routers(
    dense: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], sides: Mapping[str, Side]
) -> None:
    """Each block with experts has one matrix with a row for each of them, and no table that names them."""
    whole = {name: tensor for name, tensor in dense.state_dict().items() if name not in sides}
    for block in {side.block for side in sides.values()}:
        inside = {name: side for name, side in sides.items() if side.block == block}
        homes = {_home(n) for n, s in inside.items() if len(shapes[n]) == 3 or s.each > 1}
        rows = [n for n, s in inside.items() if len(shapes[n]) == 2 and s.axis == 0 and _home(n) not in homes]
        start = _in_common(list(inside))
        if len(rows) != 1:
            found = ", ".join(f"'{name}'" for name in rows) or "none"
            raise _cannot(
                f"where the router of '{start}' should have one matrix of a row for each, there is {found}"
            )
        for name, tensor in whole.items():
            if name.startswith(f"{start}.") and not tensor.is_floating_point():
                raise _cannot(f"the router of '{start}' takes them from a table, '{name}'")


def _in_common(names: list[str]) -> str:
    """The module that all of the parameters are in."""
    parts = zip(*(_home(name).split(".") for name in names), strict=False)
    return ".".join(same[0] for same in takewhile(lambda each: len(set(each)) == 1, parts))


def _home(parameter: str) -> str:
    """The module that a parameter is in."""
    return parameter.rpartition(".")[0]


def _cannot(why: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"experts cannot be dropped: {why}")
