"""Pictures of an inspection: where the zeros are, over blocks and kinds of layers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from secateurs.evaluation.inspection import BINS, LARGEST, REACH, Inspection, LayerInspection
from secateurs.evaluation.plot import grid, lines_by_kind, new_figure, percent, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(inspection: Inspection, folder: Path) -> list[Path]:
    """Pictures of an inspection, each as PNG and SVG, in a folder that is made if need be.

    Returns:
        The files: `sparsity`, `structure`, `distribution` and, where there is a dense model, `largest`.
    """
    files = save(_draw_sparsity(inspection), folder, "sparsity")
    files += save(_draw_structure(inspection), folder, "structure")
    files += save(_draw_distribution(inspection), folder, "distribution")
    if all(layer.largest_kept for layer in inspection.layers):
        files += save(_draw_largest(inspection), folder, "largest")
    return files


def _draw_sparsity(inspection: Inspection) -> "Figure":
    """A map of blocks and kinds."""
    kinds, blocks = inspection.kinds, 1 + max(layer.block for layer in inspection.layers)
    shares = np.full((blocks, len(kinds)), np.nan)
    for column, layers in enumerate(kinds.values()):
        for block in {layer.block for layer in layers}:
            shares[block, column] = np.mean([layer.sparsity for layer in layers if layer.block == block])
    figure = new_figure(1.8 + 0.75 * len(kinds), 1.6 + 0.32 * blocks)
    ax = figure.add_subplot()
    image = ax.imshow(shares, aspect="auto", cmap="viridis")
    middle = (np.nanmin(shares) + np.nanmax(shares)) / 2
    for (block, column), share in np.ndenumerate(shares):
        if math.isnan(share):  # a block without such a layer
            continue
        ax.text(
            column,
            block,
            f"{share:.1%}",
            ha="center",
            va="center",
            fontsize=7,
            color="black" if share > middle else "white",
        )
    ax.set_xticks(range(len(kinds)), list(kinds), fontsize=9)
    ax.set_yticks(range(blocks), [str(block) for block in range(blocks)], fontsize=8)
    ax.set_ylabel("block", fontsize=9)
    figure.colorbar(image, label="share of zeros", format="{x:.0%}")
    figure.suptitle(f"{inspection.sparsity:.1%} zeros", fontsize=11)
    return figure


def _draw_structure(inspection: Inspection) -> "Figure":
    """Dead rows and columns, and how unevenly zeros fall on the living ones, over the blocks."""
    panels: dict[str, Callable[[LayerInspection], float]] = {
        "dead rows": lambda layer: layer.rows.dead / layer.shape[0],
        "dead columns": lambda layer: layer.columns.dead / layer.shape[1],
        "sparsity of rows, most less least": lambda layer: layer.rows.most - layer.rows.least,
        "sparsity of columns, most less least": lambda layer: layer.columns.most - layer.columns.least,
    }
    return _draw_over_blocks(inspection, panels, columns=2)


def _draw_largest(inspection: Inspection) -> "Figure":
    """How much of the dense model's largest weights is still there, over the blocks."""

    def kept(index: int) -> Callable[[LayerInspection], float]:
        return lambda layer: layer.largest_kept[index] if layer.largest_kept else math.nan

    panels = {f"kept of the largest {share:.0%}": kept(index) for index, share in enumerate(LARGEST)}
    return _draw_over_blocks(inspection, panels, columns=2)


def _draw_over_blocks(
    inspection: Inspection, panels: dict[str, Callable[[LayerInspection], float]], *, columns: int
) -> "Figure":
    figure, axes = grid(len(panels), columns=columns)
    for ax, (title, value) in zip(axes, panels.items(), strict=True):
        lines_by_kind(
            ax,
            {
                kind: [(layer.block, value(layer)) for layer in layers]
                for kind, layers in inspection.kinds.items()
            },
        )
        ax.set_title(title, fontsize=9)
        percent(ax)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _draw_distribution(inspection: Inspection) -> "Figure":
    """Histograms of the non-zero weights, before and after, of each kind of layer."""
    edges = np.linspace(-REACH, REACH, BINS + 1)
    kinds = inspection.kinds
    figure, axes = grid(len(kinds))
    for ax, (kind, layers) in zip(axes, kinds.items(), strict=True):
        before = [layer.before.histogram for layer in layers if layer.before]
        if before:
            ax.stairs(np.sum(before, axis=0), edges, fill=True, color="0.82", label="before")
        after = np.sum([layer.after.histogram for layer in layers], axis=0)
        ax.stairs(after, edges, color="C0", linewidth=1.3, label="after")
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.8)
        ax.set_title(kind, fontsize=9)
    figure.supxlabel("weight, in units of its layer's root mean square; zeros are left out", fontsize=9)
    figure.supylabel("weights", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8, frameon=False
    )
    return figure
