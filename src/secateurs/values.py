"""What the weights that are left are stored as: few bits each, and a scale for every group of columns.

A weight is `level * scale`. Levels are whole numbers, the same for a whole matrix, and a code is a level's
place among them. A row's columns are divided into groups of equal length (the last may be shorter), and each
group of a row has one scale, bfloat16, of either sign. Zeros are the pattern's matter, not a level's: where a
mask says which weights are left, the levels are best spent on those.

A rounded model is an ordinary folder whose weights lie on these grids, in the model's own dtype, and which
any program loads. Beside them, in `quantised/`, lie the scales: with these `compress` finds the codes again,
and packs them, if the weights are still `level * scale` rounded to the dtype.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from secateurs.settings import parse_named

Bits = Literal[2, 3, 4, 8]
Group = Literal[32, 64, 128]
Grid = Literal["whole", "half"]

SCALES = "quantised/scales.safetensors"
"""Beside a rounded model's weights: for each parameter of the model that is rounded, by its name, scales
(rows, groups) or (experts, rows, groups), bfloat16, rows being outputs. The file's metadata has the `Values`
of each (`describe`). In a folder of its own, because programs take every file of weights for the model's."""


@dataclass(frozen=True)
class Values:
    """A grid.

    Args:
        bits: of a code.
        group: columns that share a scale.
        grid: the levels: `whole` numbers from -2^(bits-1) to 2^(bits-1) - 1, so that one of them is 0; or the
            odd numbers from -(2^bits - 1) to 2^bits - 1, `half` steps from 0 at the nearest.

    Raises:
        ValueError: none of these.
    """

    bits: Bits
    group: Group = 64
    grid: Grid = "whole"

    def __post_init__(self) -> None:
        for name, known in (("bits", Bits), ("group", Group), ("grid", Grid)):
            given = getattr(self, name)
            if given not in get_args(known) or type(given) is float:  # 4.0 is 4, but not in JSON
                kinds = ", ".join(map(str, get_args(known)))
                raise ValueError(f"{name} is one of {kinds}, not {given}")
        if self.bits == 8 and self.grid == "half":
            raise ValueError("with 8 bits the grid is whole: half a step more or less is nothing there")

    def __str__(self) -> str:
        return f"int{self.bits}, {self.grid} grid, a scale for every {self.group} inputs"

    @property
    def lowest(self) -> int:
        """The level of code 0."""
        return -(2 ** (self.bits - 1)) if self.grid == "whole" else -(2**self.bits - 1)

    @property
    def step(self) -> int:
        """Between one level and the next."""
        return 1 if self.grid == "whole" else 2

    @property
    def highest(self) -> int:
        return self.lowest + self.step * (2**self.bits - 1)

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.group)

    def encode(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The codes of the nearest levels, (..., rows, columns) uint8.

        Args:
            weight: (..., rows, columns).
            scales: (..., rows, groups); where one is 0, the code is that of the level nearest to 0.
        """
        wide = self.spread(scales, weight.shape[-1]).to(torch.promote_types(weight.dtype, torch.float32))
        levels = torch.where(wide == 0, 0, weight / torch.where(wide == 0, 1, wide))
        codes = ((levels - self.lowest) / self.step).round_()
        return codes.clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weights (..., rows, columns) of codes, float32: `level * scale`."""
        levels = codes.float().mul_(self.step).add_(self.lowest)
        return levels.mul_(self.spread(scales, codes.shape[-1]))

    def spread(self, scales: Tensor, columns: int) -> Tensor:
        """Each column's scale, (..., rows, columns)."""
        return scales.repeat_interleave(self.group, dim=-1)[..., :columns]

    def describe(self) -> dict[str, int | str]:
        """For JSON; the constructor takes it back."""
        return {"bits": self.bits, "group": self.group, "grid": self.grid}


def parse_values(text: str) -> Values:
    """Read a grid as people write it: "int4", "int3:group=128", "int4:group=32,grid=half".

    By default it is whole, and with 2 bits half, which is what loses least (docs/values.md).

    Raises:
        ValueError: an unknown name or setting, or a value that it cannot have.
    """
    name, _, settings = text.strip().partition(":")
    bits = name[3:]
    if "bits" in settings:
        raise ValueError(f"'{text}' says the bits twice: give int4:group=32, say")
    grid: Grid = "half" if bits == "2" else "whole"
    kinds = {f"int{bits}": Values for bits in reversed(get_args(Bits))}
    values: Values = parse_named(f"{name}:grid={grid},{settings},bits={bits}", kinds, "values")
    return values
