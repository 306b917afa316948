"""How training went: loss, schedule, zeros, work; and how active heads and channels are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateurs.recovery.report import RecoveryReport
from secateurs.report.charts import Axis, Kind, Point, Series, percent, plain, swatch, xy
from secateurs.report.figures import Chart, Facts, Figure, Group, Section, Table
from secateurs.report.layers import POINT, heat_map
from secateurs.report.sources import Source
from secateurs.training.loop import SHARES
from secateurs.training.report import TrainingReport

STEP = Axis("step", whole=True)

ESTIMATE = (
    "Plain training is an estimate, not a run: the same losses, each at the time until then multiplied by "
    "the speed-up by FLOPs until then. Time that a step spends on other things than products is not saved, "
    "so that plain training may well be faster than this, and it would have losses of its own."
)


SPEEDUP = "speedup_by_flops"

UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


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
            if all({"tokens", "seconds"} <= entry.keys() for entry in history):
                figures += [_losses(history, "tokens", Axis("tokens")), _losses_in_time(history)]
            else:
                figures.append(_losses(history, "step", STEP))
        for key, title, axis in (
            (
                "omission_rate",
                "What is left out of a step",
                Axis("share of what can be left out", show=percent, zero=True),
            ),
            (SPEEDUP, "Speed-up until then, by FLOPs", Axis("times plain training's pace")),
            ("sparsity", "Zeros on the way", Axis("share of zeros", show=percent, zero=True)),
        ):
            if any(key in entry for entry in history):
                figures.append(_over_steps(history, key, title, axis))
        figures.append(Facts("The run", [*report.facts[:-1], *_costs(report)]))
        if shares := _shares_trained(history):
            title = "Share of heads and channels that trained, mean over the steps"
            figures.append(heat_map(title, shares, percent, least=POINT, unit="share that trained"))
        groups.append(Group(source.name, figures))
    lead = "Losses as they were logged on the way, and which heads and channels steps left out until then."
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


def _losses(history: list[dict[str, float]], key: str, axis: Axis, note: str = "") -> Chart:
    """Losses by what entries have as `key`, and beside them by what they have as `plain`, if they do."""
    kinds = [("training", key, "loss"), ("validation", key, "eval_loss")]
    if any("plain" in entry for entry in history):
        kinds.append(("plain training, estimated", "plain", "loss"))
    series = [
        Series(
            name,
            [
                Point(e[x], e[y], f"step {e['step']:.0f}, {plain(e[x])} {axis.label}, {name}: {e[y]:.4f}")
                for e in history
                if x in e and y in e
            ],
            style,
            "marks" if y == "eval_loss" else "line",
            dashed=x == "plain",
            marked=y == "eval_loss",
        )
        for style, (name, x, y) in enumerate(kinds)
        if any(y in entry for entry in history)
    ]
    columns: list[tuple[str, Callable[[float], str], str]] = [("step", "{:.0f}".format, "step")]
    if key != "step":
        columns.append((axis.label, plain, key))
    columns += [(name, "{:.4f}".format, y) for name, x, y in kinds if x == key]
    columns += [(f"{axis.label}, {name}", plain, x) for name, x, y in kinds if x != key]
    title = "Loss" if key == "step" else f"Loss against {key}"
    data = Table(title, tuple(name for name, _, _ in columns), _rows(history, columns))
    svg = xy(series, axis, Axis("loss, nats per token"), about=f"{title} of training")
    return Chart(title, svg, [(one.name, swatch(one)) for one in series], data, note)


def _losses_in_time(history: list[dict[str, float]]) -> Chart:
    longest = max(entry["seconds"] * entry.get(SPEEDUP, 1.0) for entry in history)
    unit, size = next((unit, size) for unit, size in UNITS if longest >= 2 * size or size == 1)
    timed = [
        entry
        | {"time": entry["seconds"] / size}
        | ({"plain": entry["seconds"] * entry[SPEEDUP] / size} if SPEEDUP in entry else {})
        for entry in history
    ]
    estimated = any("plain" in entry for entry in timed)
    return _losses(timed, "time", Axis(unit), ESTIMATE if estimated else "")


def _over_steps(history: list[dict[str, float]], key: str, title: str, axis: Axis) -> Chart:
    some = [entry for entry in history if key in entry]
    points = [Point(e["step"], e[key], f"step {e['step']:.0f}: {axis.show(e[key])}") for e in some]
    svg = xy([Series(axis.label, points, 2, "steps")], STEP, axis, about=f"{title}, over the steps")
    rows = _rows(some, [("step", "{:.0f}".format, "step"), (axis.label, axis.show, key)])
    return Chart(title, svg, [], Table(title, ("step", axis.label), rows))


def _rows(
    history: list[dict[str, float]], columns: Sequence[tuple[str, Callable[[float], str], str]]
) -> list[tuple[str, ...]]:
    """Of columns of a name, how a value is shown, and its key in the entries."""
    return [tuple(show(e[key]) if key in e else "" for _, show, key in columns) for e in history]


def _shares_trained(history: list[dict[str, float]]) -> list[tuple[str, float, float]]:
    """Of the heads and the channels of each block the shares that steps ran, with how many steps."""
    found, shares, before = [], dict[str, float](), 0.0
    for entry in (entry for entry in history if "loss" in entry):
        shares |= {name: value for name, value in entry.items() if name.startswith(SHARES)}
        for name, share in shares.items():
            units, _, block = name.partition("_kept/")
            found.append((f"{block}.{units}", share, entry["step"] - before))
        before = entry["step"]
    return found


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
