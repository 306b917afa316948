"""Draw the omission rate's schedules, for docs/training.md.

python benchmarks/plot_schedules.py
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from secateurs.training.ladder import SCHEDULES, named_schedule

PICTURE = Path(__file__).parent.parent / "docs" / "schedules.svg"
STEPS = 1000


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "secateurs"  # the same bytes every time
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name in SCHEDULES:
        schedule = named_schedule(name, 0.5, STEPS)
        rates = [100 * schedule.rate(step) for step in range(STEPS)]
        shares = [100 * step / STEPS for step in range(STEPS)]
        axes.plot(shares, rates, label=name, linewidth=2.5 if name == "ladder" else 1.2)
    axes.set(xlabel="% of the optimiser steps", ylabel="omission rate, %", ylim=(-2, 55), xlim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
