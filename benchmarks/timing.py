"""Contenders that take turns, and what is made of their times.

A shared machine has slow spells. Contenders that run in turns, round after round, meet them alike, and the
ratio of two times of one round says more than that of two medians.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name")
Result = TypeVar("Result")


def in_turns(
    runs: Mapping[Name, Callable[[], Result]], rounds: int, warm_up: int = 1
) -> dict[Name, list[Result]]:
    """What each contender gives in every round, after some rounds that do not count."""
    results: dict[Name, list[Result]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        for name, run in runs.items():
            result = run()
            if number >= warm_up:
                results[name].append(result)
    return results


def timed(
    run: Callable[[], object], *, on_gpu: bool = False, before: Callable[[], object] | None = None
) -> Callable[[], float]:
    """A contender that gives the seconds of a run, which on a GPU are those between two of its events.

    Args:
        run: what is timed.
        on_gpu: whether it queues work on a GPU: that of earlier runs is over before it starts.
        before: what has to be done each time, outside the time.
    """

    def seconds() -> float:
        if before is not None:
            before()
        if not on_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        import torch

        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return seconds


def medians(times: Mapping[Name, list[float]]) -> dict[Name, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def speedup(times: Mapping[Name, list[float]], ours: Name, *theirs: Name) -> float:
    """How many times faster than the fastest of the others in the same round; the median over rounds."""
    rounds = zip(*(times[name] for name in theirs), strict=True)
    return statistics.median(min(other) / own for own, other in zip(times[ours], rounds, strict=True))
