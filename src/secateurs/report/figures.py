"""What a page is made of, as data: sections of groups of figures. How they look is the template's affair."""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """Rows of text, or the numbers below a chart."""

    kind: ClassVar = "table"

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Chart:
    """A drawing, and the numbers that it shows."""

    kind: ClassVar = "chart"

    title: str
    svg: Markup
    legend: list[tuple[str, Markup]]
    """Names, and what they are drawn with."""
    data: Table
    note: str = ""
    """How what it shows was come by, where that needs to be said."""


@dataclass(frozen=True)
class HeatMap:
    """One value for each matrix, or what else there is, of each block."""

    kind: ClassVar = "heat"

    title: str
    columns: list[str]
    rows: list[tuple[str, list["Cell | None"]]]
    ends: tuple[str, str]
    """The values at the ends of the scale."""
    data: Table


@dataclass(frozen=True)
class Cell:
    """A field of a heat map."""

    shade: float
    """From 0 to 1."""
    text: str
    tip: str


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar = "facts"

    title: str
    rows: list[tuple[str, str]]


class Part(NamedTuple):
    """A piece of a text."""

    text: str
    marked: bool = False
    """Whether another text has it not."""
    shade: float = 0.0
    """From 0 to 1."""
    tip: str = ""


@dataclass(frozen=True)
class Column:
    """A text, under a name and what is to be said of it."""

    name: str
    note: str
    parts: list[Part]

    @property
    def has_tips(self) -> bool:
        return any(part.tip for part in self.parts)


@dataclass(frozen=True)
class Texts:
    """A prompt, and how several models go on from it."""

    kind: ClassVar = "texts"

    title: str
    columns: list[Column]


@dataclass(frozen=True)
class Code:
    """Text to be read as it is, folded away."""

    kind: ClassVar = "code"

    title: str
    text: str


Figure = Table | Chart | HeatMap | Facts | Texts | Code


@dataclass(frozen=True)
class Group:
    """Figures of one model, say. Several groups are tabs."""

    name: str
    figures: list[Figure]
    lead: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    lead: str
    groups: list[Group] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not any(group.figures for group in self.groups)
