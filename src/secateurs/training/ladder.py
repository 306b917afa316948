"""LORS, the ladder omission rate scheduler, and the schedules to compare it with.

A schedule is a pure function of the optimiser step. Rates change rung by rung rather than step by step:
within a rung every layer keeps its size, so that memory is reused and a compiled model stays valid.
"""

from dataclasses import dataclass
from typing import Protocol

SCHEDULES = ("ladder", "constant", "linear", "cubic")


class Schedule(Protocol):
    """The omission rate over a training run."""

    @property
    def peak(self) -> float:
        """The highest rate, in [0, 1)."""

    @property
    def steps(self) -> int:
        """Optimiser steps that the schedule spans; it stays at its last rate after that."""

    def rate(self, step: int) -> float:
        """Share of heads and channels that optimiser step `step` (counted from 0) omits."""


@dataclass(frozen=True)
class Constant:
    """The same rate throughout: training ends sparse."""

    peak: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.peak, self.steps)

    def rate(self, step: int) -> float:
        return self.peak


@dataclass(frozen=True)
class Ladder:
    """LORS (arXiv 2406.01392, section 3.3): a constant phase, then rungs of equal length down to 0.

    Args:
        peak: the rate of the first phase.
        steps: optimiser steps in all.
        hold: the first phase's share of them.
        rungs: of the second phase. The first lies one rung below the peak, the last is dense.
    """

    peak: float
    steps: int
    hold: float = 0.5
    rungs: int = 5

    def __post_init__(self) -> None:
        _check(self.peak, self.steps, self.rungs)
        if not 0 <= self.hold < 1:
            raise ValueError(f"hold is the constant phase's share of the steps, in [0, 1), not {self.hold}")

    def rate(self, step: int) -> float:
        held = round(self.hold * self.steps)
        if step < held:
            return self.peak
        rung = _rung(step - held, self.steps - held, self.rungs)
        return self.peak * (1 - (rung + 1) / self.rungs)


@dataclass(frozen=True)
class Linear:
    """From the peak straight down to 0, in rungs of equal length."""

    peak: float
    steps: int
    rungs: int = 6

    def __post_init__(self) -> None:
        _check(self.peak, self.steps, self.rungs)

    def rate(self, step: int) -> float:
        return self.peak * (1 - _rung(step, self.steps, self.rungs) / max(1, self.rungs - 1))


@dataclass(frozen=True)
class Cubic:
    """The peak times 1 - t^3, in rungs of equal length: slow to leave the peak, quick at the end."""

    peak: float
    steps: int
    rungs: int = 6

    def __post_init__(self) -> None:
        _check(self.peak, self.steps, self.rungs)

    def rate(self, step: int) -> float:
        return self.peak * (1 - (_rung(step, self.steps, self.rungs) / max(1, self.rungs - 1)) ** 3)


def named_schedule(name: str, peak: float, steps: int) -> Schedule:
    """One of SCHEDULES over `steps` optimiser steps.

    The ladder holds the peak for two fifths of them, descends by three rungs, and is dense for the last
    three tenths: the dense phase must come while the learning rate is not yet near 0.

    Raises:
        ValueError: there is no such schedule, the rate is outside [0, 1), or there are no steps.
    """
    kinds = {"constant": Constant, "linear": Linear, "cubic": Cubic}
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule '{name}': choose from {', '.join(SCHEDULES)}")
    if name == "ladder":
        return Ladder(peak, max(1, round(0.8 * steps)), rungs=4)
    return kinds[name](peak, steps)


def check_rate(rate: float, what: str = "rate") -> None:
    """Raises ValueError unless `rate` is in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"{what} is the share of heads and channels to omit, in [0, 1), not {rate}")


def _check(peak: float, steps: int, rungs: int = 1) -> None:
    check_rate(peak)
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, not {steps}")
    if rungs < 1:
        raise ValueError(f"a ladder needs at least one rung, not {rungs}")


def _rung(step: int, steps: int, rungs: int) -> int:
    """Which of `rungs` equal parts of `steps` a step falls in; the last step is always in the last."""
    return min(rungs - 1, ((step + 1) * rungs - 1) // max(1, steps))
