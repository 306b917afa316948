"""Charts as SVG, without a library: axes, lines, steps, areas and marks.

A panel is drawn for 320 to 480 pixels, so that its text keeps its size on a telephone and on a desk: a page
shows several beside each other rather than one that is wide. Colours are classes (`s0`, `s1`...), which the
page's two themes define; shapes of marks tell series apart without them. `data-tip` is what a pointer shows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 42

STYLES = 7
"""Colours and shapes that there are."""

Kind = Literal["line", "marks", "steps", "area"]


@dataclass(frozen=True)
class Point:
    """A place in a chart; with a y that is not finite it is left out."""

    x: float
    y: float
    tip: str = ""
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together."""

    name: str
    points: Sequence[Point]
    style: int
    kind: Kind = "line"
    """Lines and marks have marks at their points; steps hold a value until the next."""
    dashed: bool = False
    marked: bool = True


def plain(value: float) -> str:
    """A number with as many digits as are worth reading."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share, without digits that are 0 anyway."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


@dataclass(frozen=True)
class Axis:
    """One of the two."""

    label: str
    log: bool = False
    show: Callable[[float], str] = plain
    whole: bool = False
    """Only whole numbers are marked."""
    zero: bool = False
    """Begins there."""


class _Scale:
    """From values to pixels."""

    def __init__(self, axis: Axis, values: list[float], start: float, end: float) -> None:
        values = [value for value in values if value > 0] if axis.log else values
        low, high = (min(values), max(values)) if values else (1.0, 10.0)
        self.axis, self.start, self.end = axis, start, end
        if axis.log:
            margin = 10 ** (0.08 * (math.log10(high / low) or 0.5))
            low, high = low / margin, high * margin
        else:
            margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
            low, high = (0.0 if axis.zero else low - margin), high + margin
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.axis.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values, four to seven of them."""
        return (
            _decades(self.low, self.high) if self.axis.log else _steps(self.low, self.high, self.axis.whole)
        )


def _steps(low: float, high: float, whole: bool) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """On a logarithmic axis: of all decades as many marks as there is room for."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) >= 4:
            return found[:: math.ceil(len(found) / 7)]
    return _steps(low, high, whole=False)


def xy(series: Sequence[Series], x: Axis, y: Axis, *, about: str) -> Markup:
    """A panel with two axes.

    Args:
        about: what it shows, for those who do not see it.
    """
    shown = [[p for p in one.points if _drawable(p, x, y)] for one in series]
    points = [point for some in shown for point in some]
    across = _Scale(x, [point.x for point in points], LEFT, WIDTH - RIGHT)
    up = _Scale(y, [point.y for point in points], HEIGHT - BOTTOM, TOP)
    parts = [*_grid(across, up)]
    for one, some in sorted(zip(series, shown, strict=True), key=lambda pair: pair[0].kind != "area"):
        parts += _drawn(one, [(across(p.x), up(p.y), p) for p in some], up.start)
    parts += _labels([(across(p.x), up(p.y), p.label) for p in points if p.label])
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(about)}">'
        f"{''.join(parts)}</svg>"
    )


def _drawable(point: Point, x: Axis, y: Axis) -> bool:
    return all(
        math.isfinite(value) and (value > 0 or not axis.log) for value, axis in ((point.x, x), (point.y, y))
    )


def _grid(across: _Scale, up: _Scale) -> list[str]:
    bottom, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    parts = []
    for tick in up.ticks:
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">')
        parts.append(f"{escape(up.axis.show(tick))}</text>")
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for tick in across.ticks:
        at = across(tick)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">')
        parts.append(f"{escape(across.axis.show(tick))}</text>")
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">')
    parts.append(f"{escape(across.axis.label)}</text>")
    height = (TOP + bottom) / 2
    parts.append(f'<text class="name" transform="translate(13 {height}) rotate(-90)" text-anchor="middle">')
    parts.append(f"{escape(up.axis.label)}</text>")
    return parts


def _drawn(series: Series, places: list[tuple[float, float, Point]], bottom: float) -> list[str]:
    if not places:
        return []
    colour = f"s{series.style % STYLES}"
    dashed = " dashed" if series.dashed else ""
    parts = []
    if series.kind != "marks":
        path = _path(series.kind, [(px, py) for px, py, _ in places])
        if series.kind == "area":
            path += f"L{places[-1][0]:.1f} {bottom:.1f}L{places[0][0]:.1f} {bottom:.1f}Z"
        parts.append(f'<path class="{series.kind} {colour}{dashed}" d="{path}"/>')
    for px, py, point in places:
        tip = f' data-tip="{escape(point.tip)}"' if point.tip else ""
        if series.marked and series.kind in ("line", "marks"):
            parts.append(f'<path class="mark {colour}{dashed}" d="{_mark(series.style, px, py)}"{tip}/>')
        elif point.tip:
            parts.append(f'<circle class="spot {colour}" cx="{px:.1f}" cy="{py:.1f}" r="5"{tip}/>')
    return parts


def _path(kind: Kind, places: list[tuple[float, float]]) -> str:
    path, before = "", None
    for px, py in places:
        if before is None:
            path += f"M{px:.1f} {py:.1f}"
        else:
            path += f"H{px:.1f}V{py:.1f}" if kind == "steps" else f"L{px:.1f} {py:.1f}"
        before = py
    return path


def _mark(style: int, x: float, y: float, r: float = 4.2) -> str:
    """The outline of a circle, square, diamond, triangle, cross, triangle upside down or star."""
    if style % STYLES == 0:
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"
    corners: dict[int, list[tuple[float, float]]] = {
        1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        2: [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        3: [(0, -1.3), (1.25, 0.95), (-1.25, 0.95)],
        4: [(-1.2, -0.4), (-0.4, -0.4), (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4),
            (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4)],
        5: [(0, 1.3), (1.25, -0.95), (-1.25, -0.95)],
        6: [((0.7 if i % 2 else 1.6) * math.sin(i * math.pi / 5),
             (-0.7 if i % 2 else -1.6) * math.cos(i * math.pi / 5)) for i in range(10)],
    }  # fmt: skip
    places = (f"{x + 0.9 * r * dx:.1f} {y + 0.9 * r * dy:.1f}" for dx, dy in corners[style % STYLES])
    return f"M{'L'.join(places)}Z"


def _labels(places: list[tuple[float, float, str]]) -> list[str]:
    """Words beside points, where there is room for them: right, above, left or below, or else nowhere."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in places]
    parts = []
    for x, y, text in sorted(places):
        wide = 6.4 * len(text)
        for anchor, dx, dy in (("start", 8, 4), ("middle", 0, -9), ("end", -8, 4), ("middle", 0, 17)):
            left = x + dx - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            box = (left, y + dy - 10, left + wide, y + dy + 2)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 2 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                parts.append(f'<text class="label" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">')
                parts.append(f"{escape(text)}</text>")
                break
    return parts


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def swatch(series: Series) -> Markup:
    """What a series is drawn with, for a legend."""
    colour = f"s{series.style % STYLES}"
    dashed = " dashed" if series.dashed else ""
    if series.kind == "area":
        inside = f'<rect class="area {colour}" x="2" y="2" width="20" height="10"/>'
    else:
        line = f'<path class="line {colour}{dashed}" d="M1 7H23"/>' if series.kind != "marks" else ""
        marked = series.marked and series.kind in ("line", "marks")
        mark = f'<path class="mark {colour}{dashed}" d="{_mark(series.style, 12, 7)}"/>' if marked else ""
        inside = line + mark
    return Markup(f'<svg class="swatch" viewBox="0 0 24 14" aria-hidden="true">{inside}</svg>')
