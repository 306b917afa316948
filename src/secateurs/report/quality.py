"""The first look: what a model is still worth, against what it takes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from secateurs.evaluation.measured import Measured
from secateurs.report.charts import Axis, Point, Series, plain, swatch, xy
from secateurs.report.figures import Chart, Figure, Group, Section, Table
from secateurs.report.sources import Source, with_names

UNITS = {"perplexity": "perplexity", "divergence": "KL, nats per token"}

SHOWN = ("acc_norm", "acc", "perplexity", "word_perplexity", "exact_match,strict-match")
"""Of a task's metrics the one that is drawn: the first of these, or of all."""

SHOW: dict[str, Callable[[float], str]] = {"zeros": "{:.1%}".format, "MB": "{:,.1f}".format}
"""Columns that are not shown as plain numbers."""

DENSE = 6
"""The style of its mark: a star."""


def quality(sources: Sequence[Source]) -> Section:
    """Charts of every figure against bytes, and tokens per second, and a table of everything."""
    rows = [row for source in sources for row in _told_apart(source, sources)]
    figures: list[Figure] = []
    good = [row for row in rows if row.figures]
    for on, metric in _shown(good):
        some = [row for row in good if metric in row.figures.get(on, {}) and row.bytes]
        if len(some) > 1:
            figures.append(_against_bytes(some, on, metric))
    some = [row for row in good if row.tokens_per_second and row.bytes]
    if len(some) > 1:
        figures.append(
            _chart("Speed", some, lambda row: row.tokens_per_second or 0.0, "tokens per second", log=False)
        )
    if rows:
        figures.append(table_of(rows))
    lead = (
        "Each mark is a model: the further left, the smaller, by the bytes of the compressed folder where "
        "compressing pays. Lines join one method's shares of zeros, and n:m patterns are marks alone; what "
        "is dashed is rounded."
    )
    return Section("quality", "Quality and size", lead, [Group("", figures)])


def _told_apart(source: Source, sources: Sequence[Source]) -> list[Measured]:
    """A folder's rows; texts and tasks that others measured otherwise have names that say how."""

    def name(on: str, short: str, metrics: dict[str, float]) -> str:
        others = [other for other in sources if any(on in row.figures for row in other.measured)]
        for setting in ("length", "bos", "field") if metrics.keys() <= UNITS.keys() else ("limit",):
            values = [other.record.get("settings", {}).get(setting) for other in others]
            value = source.record.get("settings", {}).get(setting)
            if any(other != value for other in values):
                short += f", {setting} {'unknown' if value is None else value}"
        return short

    return [
        replace(row, figures={name(on, short, row.figures[short]): row.figures[short] for on, short in pairs})
        for told, row in zip(source.measured, with_names(source.measured, sources), strict=True)
        for pairs in [list(zip(told.figures, row.figures, strict=True))]
    ]


def _shown(rows: list[Measured]) -> list[tuple[str, str]]:
    """Texts and tasks with what is drawn of them: perplexities first, then divergences, then tasks."""
    of_texts: dict[tuple[str, str], int] = {}
    for row in rows:
        for on, metrics in row.figures.items():
            if metrics.keys() <= UNITS.keys():
                of_texts |= {(on, metric): list(UNITS).index(metric) for metric in metrics}
            else:
                metric = next((name for name in SHOWN if name in metrics), next(iter(metrics)))
                of_texts[on, metric] = len(UNITS)
    return sorted(of_texts, key=lambda pair: of_texts[pair])


def _against_bytes(rows: list[Measured], on: str, metric: str) -> Chart:
    title = f"{metric.capitalize()} on {on}"
    return _chart(
        title, rows, lambda row: row.figures[on][metric], UNITS.get(metric, metric), log=metric in UNITS
    )


def _chart(
    title: str, rows: list[Measured], value: Callable[[Measured], float], unit: str, *, log: bool
) -> Chart:
    """One colour for each method, dashed and hollow where it rounds; one line for each that it rounds to."""
    methods = list(dict.fromkeys(row.method for row in rows if row.method))
    lines: dict[tuple[str | None, str | None, bool], list[Measured]] = {}
    for row in rows:
        lines.setdefault((row.method, row.values, ":" in (row.pattern or "")), []).append(row)
    series = []
    for (method, values, in_groups), some in lines.items():
        some.sort(key=lambda row: row.bytes or 0)
        points = [
            Point(
                (row.bytes or 0) / 1e6,
                value(row),
                f"{row.name}: {plain(value(row))} at {(row.bytes or 0) / 1e6:.1f} MB",
                row.pattern or row.form if method else row.name if len(some) > 1 else "dense",
            )
            for row in some
        ]
        alone = not method or in_groups or len(some) == 1
        parts = (method, "n:m" if in_groups else None, values)
        name = " ".join(part for part in parts if part) or "not pruned"
        style = methods.index(method) % DENSE if method else DENSE
        series.append(Series(name, points, style, "marks" if alone else "line", dashed=bool(values)))
    data = Table(
        title,
        ("model", "MB", unit),
        [(row.name, f"{(row.bytes or 0) / 1e6:.1f}", plain(value(row))) for row in rows],
    )
    svg = xy(series, Axis("compressed size, MB"), Axis(unit, log=log), about=f"{title}, against size in MB")
    return Chart(title, svg, [(one.name, swatch(one)) for one in series], data)


def head_of(rows: list[Measured]) -> list[tuple[str, Callable[[Measured], float | None]]]:
    """The columns of numbers that some rows have."""
    pairs: dict[tuple[str, str], None] = {}
    for row in rows:
        for on, metrics in row.figures.items():
            pairs |= dict.fromkeys((on, metric) for metric in metrics if not metric.endswith("stderr"))

    def figure(on: str, metric: str) -> Callable[[Measured], float | None]:
        return lambda row: row.figures.get(on, {}).get(metric)

    columns: list[tuple[str, Callable[[Measured], float | None]]] = [
        ("zeros", lambda row: row.sparsity),
        ("MB", lambda row: None if row.bytes is None else row.bytes / 1e6),
        *((f"{on} {metric}", figure(on, metric)) for on, metric in pairs),
        ("tokens/s", lambda row: row.tokens_per_second),
        ("seconds", lambda row: row.seconds),
    ]
    return [(name, of) for name, of in columns if any(of(row) is not None for row in rows)]


def numbers_of(rows: list[Measured]) -> tuple[tuple[str, ...], list[tuple[str | float | None, ...]]]:
    """Everything that was measured, with all digits: names of columns, and a model a row."""
    columns = head_of(rows)
    failed = any(row.error for row in rows)
    head = ("model", *(name for name, _ in columns), *(["what went wrong"] if failed else []))
    return head, [
        (row.name, *(of(row) for _, of in columns), *([row.error] if failed else [])) for row in rows
    ]


def table_of(rows: list[Measured]) -> Table:
    """The same, as people read it."""

    def shown(name: str, value: str | float | None) -> str:
        return value or "" if not isinstance(value, int | float) else SHOW.get(name, plain)(value)

    head, lines = numbers_of(rows)
    return Table("All figures", head, [tuple(map(shown, head, line)) for line in lines])
