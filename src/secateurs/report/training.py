"""How training went: loss, schedule, zeros, work; and how active heads and channels are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateurs.recovery.report import RecoveryReport
from secateurs.report.charts import Axis, Kind, Point, Series, percent, plain, swatch, xy
from secateurs.report.figures import Chart, Facts, Figure, Group, Section, Table
from secateurs.report.sources import Source
from secateurs.training.report import TrainingReport

STEP = Axis("step", whole=True)


def training(sources: Sequence[Source]) -> Section:
    """Charts of each trained or recovered folder."""
    groups = []
    for source in sources:
        report = source.trained
        if not isinstance(report, TrainingReport | RecoveryReport):
            continue
        figures: list[Figure] = []
        history = report.history or []
        if len([entry for entry in history if "loss" in entry]) > 1:
            figures.append(_losses(history))
        for key, title, unit in (
            ("omission_rate", "What is left out of a step", "share of what can be left out"),
            ("sparsity", "Zeros on the way", "share of zeros"),
        ):
            if any(key in entry for entry in history):
                figures.append(_shares(history, key, title, unit))
        figures.append(Facts("The run", [*report.facts[:-1], *_costs(report)]))
        groups.append(Group(source.name, figures))
    lead = "Losses as they were logged on the way, and the rate at which steps left heads and channels out."
    return Section("training", "Training", lead, groups)


def _costs(report: TrainingReport | RecoveryReport) -> list[tuple[str, str]]:
    pace = report.tokens / max(report.seconds, 1e-9)
    facts = [
        ("Time", f"{report.seconds:,.1f} s, {pace:,.0f} tokens per second"),
        ("Peak memory", f"{report.peak_memory_bytes / 1e6:,.0f} MB"),
    ]
    if isinstance(report, TrainingReport):
        if report.flops is not None and report.dense_flops:
            facts.append(("FLOPs", f"{percent(report.flops / report.dense_flops)} of what dense steps take"))
        if report.whole:
            facts.append(("Not sparse", report.whole))
    return facts


def _losses(history: list[dict[str, float]]) -> Chart:
    kinds = (("loss", "training"), ("eval_loss", "validation"))
    series = [
        Series(
            name,
            [
                Point(e["step"], e[key], f"step {e['step']:.0f}, {name}: {e[key]:.4f}")
                for e in history
                if key in e
            ],
            style,
            "line" if style == 0 else "marks",
            marked=style > 0,
        )
        for style, (key, name) in enumerate(kinds)
        if any(key in entry for entry in history)
    ]
    rows: list[tuple[str, ...]] = [
        (f"{e['step']:.0f}", *(f"{e[key]:.4f}" if key in e else "" for key, _ in kinds)) for e in history
    ]
    svg = xy(series, STEP, Axis("loss, nats per token"), about="Loss over the steps of training")
    data = Table("Loss", ("step", "training", "validation"), rows)
    return Chart("Loss", svg, [(one.name, swatch(one)) for one in series], data)


def _shares(history: list[dict[str, float]], key: str, title: str, unit: str) -> Chart:
    some = [entry for entry in history if key in entry]
    points = [Point(e["step"], e[key], f"step {e['step']:.0f}: {percent(e[key])}") for e in some]
    series = Series(unit, points, 2, "steps")
    svg = xy([series], STEP, Axis(unit, show=percent, zero=True), about=f"{title}, over the steps")
    rows: list[tuple[str, ...]] = [(f"{e['step']:.0f}", percent(e[key])) for e in some]
    return Chart(title, svg, [], Table(title, ("step", unit), rows))


MEASURES = {
    "barely_active": "Barely active on a token",
    "quiet": "Quiet on the whole text",
    "half_keeps": "What the stronger half holds",
}
"""Of `secateurs.training.profile.Activity`."""


def activity(sources: Sequence[Source]) -> Section:
    """How active the heads and channels of profiled models are."""
    groups = []
    for source in sources:
        if source.activity is None:
            continue
        blocks: list[dict[str, Any]] = source.activity["blocks"]
        figures: list[Figure] = [_activity(blocks, key, title) for key, title in MEASURES.items()]
        about = source.activity["settings"]
        text = f"{about['windows']} x {about['length']} tokens of {Path(about['text']).name}"
        lead = f"{Path(about['model']).name} on {text}."
        groups.append(Group(source.name, figures, lead))
    lead = "What sparse training may leave out: the share of heads and channels that hardly take part."
    return Section("activity", "Activity", lead, groups)


def _activity(blocks: list[dict[str, Any]], key: str, title: str) -> Chart:
    kinds = ("heads", "channels")
    found = {
        kind: [(index, block[kind][key]) for index, block in enumerate(blocks) if block.get(kind)]
        for kind in kinds
    }
    line: Kind = "line"
    series = [
        Series(kind, [Point(b, v, f"block {b}, {kind}: {percent(v)}") for b, v in found[kind]], style, line)
        for style, kind in enumerate(kinds)
        if found[kind]
    ]
    svg = xy(
        series, Axis("block", whole=True), Axis("share", show=percent, zero=True), about=f"{title}, by block"
    )
    rows: list[tuple[str, ...]] = [
        (str(index), *(plain(block[kind][key]) if block.get(kind) else "" for kind in kinds))
        for index, block in enumerate(blocks)
    ]
    return Chart(
        title, svg, [(one.name, swatch(one)) for one in series], Table(title, ("block", *kinds), rows)
    )
