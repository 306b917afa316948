"""Pictures of a pruning run, from the record that it left: PNG to look at, SVG to print.

matplotlib's figures are made directly, without pyplot: no window, no backend, no state to leave behind.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from secateurs.checkpoint import RECORD
from secateurs.pruning.record import MLPReport, Refinement, Report
from secateurs.settings import takes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.2, 2.4)
"""Inches of one panel of a grid."""


@dataclass(frozen=True)
class PlotSettings:
    """Draw what the record of a pruned model holds: error and sparsity per layer, how SparseLLM's iterations
    converged, and what the descent gained in each block.

    Example: secateurs plot my-llama-70
    """

    output: str | Path | None = None
    """A folder for the pictures, PNG and SVG. By default `plots` inside the model's."""


@takes(PlotSettings)
def plot(folder: str | Path, *, settings: PlotSettings) -> list[Path]:
    """Draw what became of each layer; how the iterations on each MLP converged, and what the descent on each
    block gained, if there were any.

    Args:
        folder: of a pruned model. Older pictures are replaced.

    Returns:
        The files: `layers` and perhaps `convergence` and `descent`, each as .png and .svg.

    Raises:
        ValueError: the folder holds no record of a run, or none that can be read.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise ValueError(f"'{folder}' has no {RECORD}: only what `secateurs prune` wrote can be plotted")
    report = Report.read(folder)
    if not report.layers:
        raise ValueError(f"of '{folder}' there is nothing to plot: experts were dropped, and no layer pruned")
    output = folder / "plots" if settings.output is None else Path(settings.output)
    check_folder(output)
    files = save(_layers(report), output, "layers")
    if report.mlps:
        files += save(_convergence(report.mlps), output, "convergence")
    if report.refinements:
        files += save(_descent(report.refinements), output, "descent")
    return files


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def grid(panels: int, *, columns: int = 4) -> tuple["Figure", list["Axes"]]:
    """A figure of so many panels, row by row."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = new_figure(PANEL[0] * columns + 0.6, PANEL[1] * rows + 0.9)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for ax in axes:
        tidy(ax)
    return figure, axes


def tidy(ax: "Axes") -> None:
    """Only the lines that help to read."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.tick_params(labelsize=8)


def logarithmic(ax: "Axes") -> None:
    """A logarithmic y axis that says 0.2, not 2 times a power of ten."""
    from matplotlib.ticker import LogLocator

    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(which="minor", labelsize=7)


def percent(ax: "Axes") -> None:
    """A y axis of shares, with as many digits as tell its ticks apart."""
    from matplotlib.ticker import PercentFormatter

    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def lines_by_kind(ax: "Axes", points: dict[str, list[tuple[int, float]]]) -> None:
    """One line for each kind of layer, over the blocks: of experts, through their mean."""
    from matplotlib.ticker import MaxNLocator

    markers = "osD^vPX*"
    for index, (kind, line) in enumerate(points.items()):
        blocks: dict[int, list[float]] = {}
        for x, y in line:
            blocks.setdefault(x, []).append(y)
        ax.plot(
            list(blocks),
            [fmean(values) for values in blocks.values()],
            marker=markers[index % len(markers)],
            markersize=4,
            linewidth=1.2,
            label=kind,
        )
    ax.set_xlabel("block", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    tidy(ax)


def place(name: str) -> tuple[int, str]:
    """A layer's block and its name within, which experts share.

    "model.layers.3.mlp.up_proj" is (3, "mlp.up_proj"), and "model.layers.3.mlp.experts.7.down_proj" is
    (3, "mlp.experts.*.down_proj").
    """
    parts = name.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    block, rest = int(parts[at]), parts[at + 1 :]
    if len(rest) > 2 and rest[-2].isdigit():
        rest[-2] = "*"
    return block, ".".join(rest)


def check_folder(output: Path) -> None:
    """Raises ValueError if pictures cannot be put into a folder of that name."""
    wanted = output.resolve()
    there = next(each for each in (wanted, *wanted.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"pictures cannot be put into '{output}': give another folder")


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and as SVG; returns both paths."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same figure gives the same bytes
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def _layers(report: Report) -> "Figure":
    """Error and sparsity of each layer, over the blocks."""
    errors: dict[str, list[tuple[int, float]]] = {}
    sparsities: dict[str, list[tuple[int, float]]] = {}
    for layer in report.layers:
        block, kind = place(layer.name)
        errors.setdefault(kind, []).append((block, layer.error))
        sparsities.setdefault(kind, []).append((block, layer.sparsity))
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    lines_by_kind(left, errors)
    left.set_ylabel("relative squared error of the output", fontsize=9)
    if all(layer.error > 0 for layer in report.layers):
        logarithmic(left)
    lines_by_kind(right, sparsities)
    right.set_ylabel("share of zeros", fontsize=9)
    percent(right)
    low, high = (pick(layer.sparsity for layer in report.layers) for pick in (min, max))
    margin = max(0.02, 0.1 * (high - low))
    right.set_ylim(max(0.0, low - margin), min(1.0, high + margin))
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    method = report.settings["method"]["name"]
    figure.suptitle(f"{method}, {report.sparsity:.1%} zeros", fontsize=11)
    return figure


def _convergence(mlps: list[MLPReport]) -> "Figure":
    """A panel for each block: the objective, its terms and the held-out error over the iterations."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = grid(len(mlps))
    terms = list(dict.fromkeys(term for mlp in mlps for iterate in mlp.iterates for term in iterate.terms))
    styles: list[tuple[str, dict[str, Any]]] = [
        ("objective", {"color": "black", "linewidth": 1.6, "marker": "o", "markersize": 3}),
        *((term, {"color": f"C{index}", "linewidth": 1.0}) for index, term in enumerate(terms)),
        (
            "held-out error",
            {"color": "black", "linewidth": 1.6, "linestyle": "--", "marker": "o", "markersize": 3},
        ),
    ]
    for ax, mlp in zip(axes, mlps, strict=True):
        curves: dict[str, list[float]] = {
            "objective": [iterate.objective or math.nan for iterate in mlp.iterates],
            "held-out error": [iterate.held_out for iterate in mlp.iterates],
            **{term: [iterate.terms.get(term, math.nan) for iterate in mlp.iterates] for term in terms},
        }
        for name, style in styles:
            # On a logarithmic axis a term that is 0 has no place.
            ax.plot([value if value > 0 else math.nan for value in curves[name]], label=name, **style)
        ax.plot(
            [mlp.kept],
            [mlp.iterates[mlp.kept].held_out],
            marker="*",
            markersize=12,
            color="crimson",
            markeredgecolor="white",
            linestyle="none",
            label="kept",
            zorder=5,
        )
        logarithmic(ax)
        ax.set_title(mlp.name, fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("relative to the targets' energy", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def _descent(refinements: list[Refinement]) -> "Figure":
    """The error of each block's result before the descent on its weights, and after."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(2 * PANEL[0] + 0.6, PANEL[1] + 0.9)
    ax = figure.add_subplot()
    tidy(ax)
    blocks = [int(refinement.name.rpartition(".")[2]) for refinement in refinements]
    after = [
        r.before if r.after is None else min(r.before, r.after)  # what is no better is not taken
        for r in refinements
    ]
    before = [refinement.before for refinement in refinements]
    for label, errors, color in (("before the descent", before, "C0"), ("after", after, "crimson")):
        shown = [error if error > 0 else math.nan for error in errors]
        ax.plot(blocks, shown, label=label, color=color, marker="o", markersize=3, linewidth=1.2)
    failed = [r for r in refinements if r.after is None or r.after >= r.before]
    if failed:
        places = [int(r.name.rpartition(".")[2]) for r in failed]
        style: dict[str, Any] = {"color": "black", "marker": "x", "linestyle": "none", "zorder": 5}
        ax.plot(places, [r.before for r in failed], label="no better, and not taken", **style)
    logarithmic(ax)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("block", fontsize=9)
    ax.set_ylabel("error of what the block adds", fontsize=9)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure
