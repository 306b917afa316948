"""What there is to see of a linear layer, pruned or not: zeros, their structure, what was kept."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from secateurs.evaluation.plot import place
from secateurs.values import Values

LARGEST = (0.01, 0.1)
"""Shares of the dense model's largest weights that are followed."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MEDIAN = QUANTILES.index(0.5)

BINS, REACH = 100, 5.0
"""Of the histograms: from -REACH to REACH times the layer's root mean square; the last bins hold the rest."""

GROUPS = (2, 4, 8, 16)
"""Sizes of groups of inputs in which an n:m pattern is looked for."""

CHUNK = 2**22
"""Weights sorted into bins at a time."""


@dataclass(frozen=True)
class Distribution:
    """The non-zero weights of a layer."""

    quantiles: tuple[float, ...]
    """Of |w|, at QUANTILES."""
    histogram: tuple[int, ...]
    """Of w over the root mean square of the dense layer (without one, of the non-zero weights); see BINS."""


@dataclass(frozen=True)
class Spread:
    """Sparsity of the rows or columns of a layer."""

    least: float
    mean: float
    most: float
    dead: int
    """How many hold nothing but zeros."""


@dataclass(frozen=True)
class LayerInspection:
    """One linear layer."""

    name: str
    block: int
    kind: str
    """Its role: q, k, v, o, gate, up or down; of a fused layer, its name."""
    shape: tuple[int, int]
    """(out, in)."""
    sparsity: float
    """Share of weights that are zero."""
    rows: Spread
    """Over outputs."""
    columns: Spread
    """Over inputs."""
    pattern: str | None
    """The tightest n:m that every m inputs obey and that makes four fifths of the zeros, or None."""
    after: Distribution
    before: Distribution | None
    """In the dense model, if there is one to compare with."""
    largest_kept: tuple[float, ...] | None
    """How many of the dense layer's largest weights by magnitude are not zero, for each of LARGEST."""
    values: Values | None = None
    """The grid that it was rounded to: bits, and how many inputs share a scale. None if it was not."""

    @property
    def weights(self) -> int:
        """How many there are, zeros included."""
        return self.shape[0] * self.shape[1]

    @property
    def expert(self) -> bool:
        """Whether it is one of a block's experts."""
        return "*" in place(self.name)[1]

    @property
    def shown(self) -> str:
        """Its name, with an asterisk for the number of an expert."""
        within = place(self.name)[1]
        parts = self.name.split(".")
        return ".".join([*parts[: len(parts) - len(within.split("."))], within])


@dataclass(frozen=True)
class Inspection:
    """A model's linear layers, and each of its experts', in the order of the forward pass."""

    model: str
    layers: list[LayerInspection]
    tables: Mapping[str, Values] = field(default_factory=dict)
    """The grids of the embedding and the head, by the parameter's name, if they were rounded."""

    @property
    def sparsity(self) -> float:
        """Share of zeros in all layers together."""
        return sum(x.sparsity * x.weights for x in self.layers) / sum(x.weights for x in self.layers)

    @property
    def kinds(self) -> dict[str, list[LayerInspection]]:
        """The layers by kind, those of experts apart."""
        return _grouped(self.layers, lambda layer: f"experts' {layer.kind}" if layer.expert else layer.kind)

    @property
    def lines(self) -> dict[str, list[LayerInspection]]:
        """The layers by what they are shown as: those of a block's experts together."""
        return _grouped(self.layers, lambda layer: layer.shown)


def _grouped(
    layers: list[LayerInspection], key: Callable[[LayerInspection], str]
) -> dict[str, list[LayerInspection]]:
    groups: dict[str, list[LayerInspection]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return groups


def inspect_layer(
    name: str, kind: str, weight: Tensor, dense: Tensor | None, values: Values | None = None
) -> LayerInspection:
    """Look at one layer.

    Args:
        name: within the model, its block's number included.
        kind: see `LayerInspection`.
        weight: (out, in), float32.
        dense: the same before pruning, or None.
        values: the grid that it was rounded to, or None.
    """
    zero = weight == 0
    unit = _rms(weight if dense is None else dense)
    return LayerInspection(
        name=name,
        block=place(name)[0],
        kind=kind,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity=int(zero.sum()) / zero.numel(),
        rows=_spread(zero.sum(dim=1), zero.shape[1]),
        columns=_spread(zero.sum(dim=0), zero.shape[0]),
        pattern=_pattern(zero),
        after=_distribution(weight, unit),
        before=None if dense is None else _distribution(dense, unit),
        largest_kept=None if dense is None else tuple(_kept(zero, dense.abs(), share) for share in LARGEST),
        values=values,
    )


def _rms(weight: Tensor) -> float:
    """Of the non-zero weights; 1 if there are none."""
    count = int(torch.count_nonzero(weight))
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(count) if count else 1.0


def _spread(zeros: Tensor, size: int) -> Spread:
    """Of the numbers of zeros in rows or columns of a size."""
    shares = zeros.double() / size
    return Spread(float(shares.min()), float(shares.mean()), float(shares.max()), int((zeros == size).sum()))


def _pattern(zero: Tensor) -> str | None:
    found = []
    for m in GROUPS:
        if zero.shape[1] % m == 0:
            n = m - int(zero.unflatten(1, (-1, m)).sum(dim=-1).min())
            if 0 < n < m and 1 - n / m >= 0.8 * float(zero.double().mean()):
                found.append((n / m, m, f"{n}:{m}"))
    return min(found)[2] if found else None


def _distribution(weight: Tensor, unit: float) -> Distribution:
    values = weight[weight != 0]
    if not len(values):
        return Distribution((0.0,) * len(QUANTILES), (0,) * BINS)
    size = values.abs().numpy()
    places = [round(quantile * (len(size) - 1)) for quantile in QUANTILES]
    quantiles = np.partition(size, places)[places]
    counts = torch.zeros(BINS, dtype=torch.int64)
    for chunk in values.split(CHUNK):
        bins = ((chunk / unit + REACH) * (BINS / (2 * REACH))).floor_().clamp_(0, BINS - 1)
        counts += torch.bincount(bins.long(), minlength=BINS)
    return Distribution(tuple(map(float, quantiles)), tuple(counts.tolist()))


def _kept(zero: Tensor, size: Tensor, share: float) -> float:
    """How many of the largest dense weights, and of what equals the last of these, are not zero."""
    count = max(1, round(share * size.numel()))
    threshold = np.partition(size.flatten().numpy(), -count)[-count]
    largest = size >= float(threshold)
    return 1 - int((zero & largest).sum()) / int(largest.sum())
