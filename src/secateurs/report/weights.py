"""Where the weights went, from the files themselves, one matrix of a model in memory at a time."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateurs.evaluation.inspect import Weights
from secateurs.evaluation.inspection import BINS, LARGEST, REACH, LayerInspection, inspect_layer
from secateurs.report.charts import Axis, Point, Series, percent, swatch, xy
from secateurs.report.figures import Chart, Figure, Group, Section, Table
from secateurs.report.layers import POINT, heat_map
from secateurs.report.sources import Source

MOST = 2**20
"""Values of a matrix that are looked at, in rows evenly spaced."""

TENTHS = 10
"""Of the dense weights by magnitude, in which zeros are counted."""

DRAWN = 3.0
"""Histograms are drawn from minus to plus so many root mean squares."""

SAMPLED = f"Of a matrix of more than {MOST:,} weights only so many are looked at, in rows evenly spaced."

HEAD = "layer's root mean squares"


@dataclass(frozen=True)
class Look:
    """What there is to see of one matrix before and after."""

    layer: LayerInspection
    """Of the rows that are looked at."""
    weights: int
    """Of the whole matrix."""
    zeros: tuple[float, ...]
    """Share of zeros in each tenth of the dense weights, from the smallest magnitudes to the largest."""


def zeros_by_size(weight: Tensor, dense: Tensor) -> tuple[float, ...]:
    """Share of zeros in each tenth of a dense matrix, from its smallest magnitudes to its largest.

    Args:
        weight: (out, in), after pruning.
        dense: (out, in), before.
    """
    zero = (weight == 0).flatten()[dense.abs().flatten().argsort()]
    return tuple(float(part.double().mean()) for part in zero.tensor_split(TENTHS) if len(part))


def weights(sources: Sequence[Source], against: Path | None) -> Section:
    """Distributions before and after, and zeros by magnitude, of pruned folders whose dense model is there.

    Raises:
        ValueError: `against` is of another shape than a folder's model.
    """
    groups = []
    for source in sources:
        dense = against or source.made_from
        if dense is None or not source.has_model or source.folder.resolve() == dense.resolve():
            continue
        ours, theirs = Weights(source.folder), Weights(dense)
        if ours.shapes != theirs.shapes:
            if against is None:
                continue  # experts were dropped, say
            raise ValueError(
                f"the matrices of '{source.folder}' are not those of '{dense}': give the model that it was "
                "made from"
            )
        looks = _looks(ours, theirs)
        if looks and any(look.layer.sparsity > 0 for look in looks):
            figures = [_zeros(looks), *_histograms(looks)]
            kept = _mean(looks, [(look.layer.largest_kept or (1.0,))[0] for look in looks])
            lead = f"Of the largest {LARGEST[0]:.0%} of the dense weights {percent(kept)} are not zero now."
            groups.append(Group(source.name, figures, lead))
    lead = (
        "Each kind of matrix over all blocks, in units of its dense root mean square. What pruning zeroed is "
        f"missing from the middle; what moved outwards makes up for it. {SAMPLED}"
    )
    return Section("weights", "Where the weights went", lead, groups)


def _looks(pruned: Weights, dense: Weights) -> list[Look]:
    looks = []
    for name, kind in pruned.kinds.items():
        weight, before = (weights.read(name, MOST) for weights in (pruned, dense))
        layer = inspect_layer(name, kind, weight, before)
        looks.append(Look(layer, math.prod(pruned.shapes[name]), zeros_by_size(weight, before)))
    return looks


def _kinds(looks: Sequence[Look]) -> dict[str, list[Look]]:
    groups: dict[str, list[Look]] = {}
    for look in looks:
        kind = f"experts' {look.layer.kind}" if look.layer.expert else look.layer.kind
        groups.setdefault(kind, []).append(look)
    return groups


def _mean(looks: Sequence[Look], values: Sequence[float]) -> float:
    """Weighted by the matrices' sizes."""
    sizes = [look.weights for look in looks]
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _zeros(looks: Sequence[Look]) -> Chart:
    """A line for each kind."""
    kinds = _kinds(looks)
    shares = {
        kind: [_mean(some, [look.zeros[tenth] for look in some]) for tenth in range(len(some[0].zeros))]
        for kind, some in kinds.items()
    }
    series = [
        Series(
            kind,
            [
                Point(10 * i + 5, share, f"{kind}, tenth {i + 1} by magnitude: {percent(share)} zeros")
                for i, share in enumerate(line)
            ],
            style,
        )
        for style, (kind, line) in enumerate(shares.items())
    ]
    title = "Zeros by magnitude"
    x = Axis("dense weights, smallest to largest", show=lambda value: f"{value:.0f}%")
    svg = xy(
        series, x, Axis("share of zeros", show=percent, zero=True), about=f"{title} of the dense weights"
    )
    rows: list[tuple[str, ...]] = [
        (f"{10 * i} to {10 * i + 10}%", *(percent(line[i]) for line in shares.values()))
        for i in range(min(map(len, shares.values())))
    ]
    data = Table(title, ("of the dense weights", *shares), rows)
    return Chart(title, svg, [(one.name, swatch(one)) for one in series], data)


def _histograms(looks: Sequence[Look]) -> list[Figure]:
    return [_histogram(kind, some) for kind, some in _kinds(looks).items()]


def _histogram(kind: str, looks: Sequence[Look]) -> Chart:
    """Before as an area, after as a line; the zeros, which would be a spike, are said in the title."""
    width = 2 * REACH / BINS
    places = [-REACH + (i + 0.5) * width for i in range(BINS)]
    counts: Mapping[str, list[int]] = {
        "before": _summed([look.layer.before.histogram for look in looks if look.layer.before]),
        "after": _summed([look.layer.after.histogram for look in looks]),
    }
    total = sum(look.layer.weights for look in looks)
    shown = [i for i, at in enumerate(places) if abs(at) < DRAWN]
    series = [
        Series(
            name,
            [
                Point(places[i], line[i] / total, f"{name}, around {places[i]:.2f}: {line[i] / total:.2%}")
                for i in shown
            ],
            0 if name == "before" else 1,
            "area" if name == "before" else "line",
            marked=False,
        )
        for name, line in counts.items()
    ]
    zeros = _mean(looks, [look.layer.sparsity for look in looks])
    title = f"{kind}: {percent(zeros)} zeros"
    svg = xy(
        series,
        Axis(f"weight, in the {HEAD}"),
        Axis("share of the weights", show=percent, zero=True),
        about=f"Distribution of the non-zero weights of {kind} before and after pruning; {title}",
    )
    rows: list[tuple[str, ...]] = [
        (f"{places[i]:.2f}", *(f"{line[i] / total:.3%}" for line in counts.values())) for i in shown
    ]
    data = Table(title, ("weight", *counts), rows)
    return Chart(title, svg, [(one.name, swatch(one)) for one in series], data)


def _summed(histograms: list[tuple[int, ...]]) -> list[int]:
    return [sum(counts) for counts in zip(*histograms, strict=True)]


def agreement(a: Tensor, b: Tensor) -> float:
    """How far two pruned matrices agree on where zeros are: the zeros of both over those of either.

    (Jaccard's index: 1 if they are the same. Masks of s zeros drawn at random come to s / (2 - s).)

    Args:
        a, b: (out, in).
    """
    either = int(((a == 0) | (b == 0)).sum())
    return int(((a == 0) & (b == 0)).sum()) / either if either else 1.0


def masks(sources: Sequence[Source]) -> Section:
    """Agreement of each two pruned folders of one shape and pattern."""
    pruned = [
        (source, source.pruning.settings.get("pattern"), Weights(source.folder))
        for source in sources
        if source.has_model and source.pruning and source.pruning.layers
    ]
    groups = []
    for (one, pattern, ours), (other, same, theirs) in itertools.combinations(pruned, 2):
        if pattern != same or ours.shapes != theirs.shapes:
            continue
        found, chance = [], []
        for name, (rows, columns) in ours.shapes.items():
            a, b = ours.read(name, MOST), theirs.read(name, MOST)
            found.append((name, agreement(a, b), float(rows * columns)))
            x, y = (float((weight == 0).double().mean()) for weight in (a, b))
            chance.append(x * y / (x + y - x * y) if x + y else 1.0)
        mean = float(torch.tensor([value for _, value, _ in found]).mean())
        lead = (
            f"{percent(mean)} of the zeros of either are zeros of both, in the mean over matrices; by chance "
            f"it would be {percent(sum(chance) / len(chance))}."
        )
        groups.append(
            Group(
                f"{one.name} and {other.name}",
                [heat_map("Agreement of zeros", found, percent, least=POINT)],
                lead,
            )
        )
    return Section("masks", "Do they agree?", f"Where two pruned models have their zeros. {SAMPLED}", groups)
