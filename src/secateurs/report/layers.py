"""What became of each matrix, and how SparseLLM's iterations and the descent went, from the records alone."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from secateurs.evaluation.plot import place
from secateurs.pruning.record import LayerReport, MLPReport, Refinement, Report
from secateurs.report.charts import Axis, Point, Series, percent, plain, swatch, xy
from secateurs.report.figures import Cell, Chart, Figure, Group, HeatMap, Section, Table
from secateurs.report.sources import Source

BLOCK = Axis("block", whole=True)

POINT = 0.01
"""One percentage point."""

HELD_OUT = "held-out error"

PANELS = 12
"""Of one kind at most: of deeper models as many, evenly from the first block to the last."""


def heat_map(
    title: str,
    values: Sequence[tuple[str, float, float]],
    show: Callable[[float], str],
    *,
    log: bool = False,
    least: float = 0.0,
    unit: str = "",
) -> HeatMap:
    """Kinds of matrices, or what else there is in a block, by blocks; several of a kind are one field.

    Args:
        values: of each matrix its name, the value, and its weight in the field's mean.
        show: a value as text.
        log: shades go by the values' logarithms.
        least: that lies between the ends of the shades, of shares: less is nothing to see.
        unit: what a value is, for the head of the table.
    """
    sums: dict[str, dict[int, tuple[float, float]]] = {}
    for name, value, weights in values:
        block, kind = place(name)
        total, size = sums.setdefault(kind, {}).get(block, (0.0, 0.0))
        sums[kind][block] = total + value * weights, size + weights
    means = {kind: {b: total / size for b, (total, size) in row.items()} for kind, row in sums.items()}
    every = [value for row in means.values() for value in row.values()]
    scaled = [_scaled(value, log) for value in every if value > 0 or not log] or [0.0]
    low, high = min(scaled), max(scaled)
    ends = show(min(every, default=0.0)), show(max(every, default=0.0))
    if high - low < least:
        low = min(max(0.0, (low + high - least) / 2), 1 - least)
        high = low + least
        ends = show(low), show(high)
    blocks = sorted({block for row in means.values() for block in row})

    def cell(kind: str, block: int) -> Cell | None:
        value = means[kind].get(block)
        if value is None:
            return None
        if ends[0] == ends[1]:  # what rounding leaves between them is nothing to see
            shade = 0.3
        else:
            shade = (_scaled(value, log) - low) / (high - low) if value > 0 or not log else 0.0
        return Cell(shade, show(value), f"block {block}, {kind}: {show(value)}")

    return HeatMap(
        title,
        [str(block) for block in blocks],
        [(kind, [cell(kind, block) for block in blocks]) for kind in means],
        ends,
        Table(
            title,
            ("block", "kind", unit or title.lower()),
            [(str(block), kind, show(row[block])) for kind, row in means.items() for block in sorted(row)],
        ),
    )


def _scaled(value: float, log: bool) -> float:
    return math.log(value) if log and value > 0 else value


def layers(sources: Sequence[Source]) -> Section:
    """Heat maps of each pruned folder."""
    groups = []
    for source in sources:
        report = source.pruning
        if report is None or not report.layers:
            continue
        found = report.layers
        figures: list[Figure] = [
            heat_map("Share of zeros", _of(found, lambda layer: layer.sparsity), percent, least=POINT),
            heat_map(
                "Error of the output",
                _of(found, lambda layer: layer.error),
                plain,
                log=True,
                unit="squared error of the output, relative to its energy",
            ),
        ]
        if report.is_rounded:
            rounding = _of(found, lambda layer: layer.rounding or 0.0)
            figures.append(heat_map("Error of rounding alone", rounding, plain, log=True))
        worst = max(found, key=lambda layer: layer.error)
        lead = (
            f"{percent(report.sparsity)} zeros in {len(found)} matrices; most is lost in {worst.name}, "
            f"{percent(worst.error)} of its output's energy."
        )
        groups.append(Group(source.name, figures, lead))
    lead = (
        "Each field is a matrix of a block. Errors are those of its output on the calibration text, before "
        "any descent, and shaded by their logarithms."
    )
    return Section("layers", "Layer by layer", lead, groups)


def _of(layers: list[LayerReport], value: Callable[[LayerReport], float]) -> list[tuple[str, float, float]]:
    return [(layer.name, value(layer), layer.weights) for layer in layers]


def convergence(sources: Sequence[Source]) -> Section:
    """What SparseLLM's iterations did to each MLP, and the descent to each block."""
    groups = []
    for source in sources:
        report = source.pruning
        if report is None:
            continue
        figures: list[Figure] = []
        if report.refinements:
            figures.append(_descent(report.refinements))
        shown = [mlp for mlp in report.mlps if len(mlp.iterates) > 1]
        step = math.ceil(len(shown) / PANELS) or 1
        figures += [_iterations(mlp) for mlp in shown[::step]]
        if figures:
            groups.append(Group(source.name, figures, _gained(report)))
    lead = (
        "Terms and objective are relative to the energy of what each is fitted to; the held-out error, that "
        "of the MLP's output on tokens that nothing was fitted to, decides which iterate is kept."
    )
    return Section("convergence", "How the solver converged", lead, groups)


def _gained(report: Report) -> str:
    said = []
    if moved := [mlp for mlp in report.mlps if len(mlp.iterates) > 1]:
        later = sum(mlp.kept > 0 for mlp in moved)
        said.append(f"Iterations helped in {later} of {len(moved)} MLPs.")
    taken = [r for r in report.refinements if r.after is not None and r.after < r.before and r.before > 0]
    if taken:
        gain = 1 - math.exp(sum(math.log((r.after or 0) / r.before) for r in taken) / len(taken))
        blocks = f"{len(taken)} of {len(report.refinements)} blocks"
        said.append(f"The descent took {percent(gain)} off a block's error, in {blocks}.")
    return " ".join(said)


def _iterations(mlp: MLPReport) -> Chart:
    terms = list(dict.fromkeys(term for iterate in mlp.iterates for term in iterate.terms))
    curves: dict[str, list[float]] = {
        HELD_OUT: [iterate.held_out for iterate in mlp.iterates],
        "objective": [iterate.objective or math.nan for iterate in mlp.iterates],
        **{term: [iterate.terms.get(term, math.nan) for iterate in mlp.iterates] for term in terms},
    }
    series = [
        Series(
            name,
            [
                Point(
                    i,
                    v,
                    f"iteration {i}, {name}: {plain(v)}",
                    "kept" if name == HELD_OUT and i == mlp.kept else "",
                )
                for i, v in enumerate(values)
            ],
            style,
            dashed=name in terms,
            marked=name not in terms,
        )
        for style, (name, values) in enumerate(curves.items())
    ]
    rows: list[tuple[str, ...]] = [
        (
            f"{i} (kept)" if i == mlp.kept else str(i),
            *(plain(values[i]) if math.isfinite(values[i]) else "" for values in curves.values()),
        )
        for i in range(len(mlp.iterates))
    ]
    svg = xy(
        series,
        Axis("iteration", whole=True),
        Axis("relative error", log=True),
        about=f"{mlp.name}: objective, terms and held-out error over {len(mlp.iterates) - 1} iterations",
    )
    data = Table(mlp.name, ("iteration", *curves), rows)
    return Chart(mlp.name, svg, [(one.name, swatch(one)) for one in series], data)


def _descent(refinements: list[Refinement]) -> Chart:
    blocks = [int(r.name.rpartition(".")[2]) for r in refinements]
    taken = [r.before if r.after is None else min(r.before, r.after) for r in refinements]
    before = [r.before for r in refinements]
    series = [
        Series(
            name,
            [Point(b, v, f"block {b}, {name}: {plain(v)}") for b, v in zip(blocks, errors, strict=True)],
            style,
        )
        for style, (name, errors) in enumerate({"before": before, "after": taken}.items())
    ]
    rows: list[Any] = [(str(b), plain(x), plain(y)) for b, x, y in zip(blocks, before, taken, strict=True)]
    title = "The descent on each block"
    svg = xy(
        series, BLOCK, Axis("error of what it adds", log=True), about=f"{title}: error before and after it"
    )
    data = Table(title, ("block", "error before", "after"), rows)
    return Chart(title, svg, [(one.name, swatch(one)) for one in series], data)
