"""Schedules: what LORS is, and what every schedule promises."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.training.ladder import SCHEDULES, Ladder, named_schedule

RUNS = st.tuples(st.sampled_from(SCHEDULES), st.floats(0, 0.95), st.integers(1, 3000))


@given(RUNS)
def test_rates_descend_from_the_peak_and_end_dense_unless_constant(run: tuple[str, float, int]) -> None:
    name, peak, steps = run
    schedule = named_schedule(name, peak, steps)
    rates = [schedule.rate(step) for step in range(steps)]
    assert rates[0] == peak or steps < 16  # fewer steps than rungs
    assert all(0 <= after <= before <= peak for before, after in pairwise(rates))
    assert schedule.rate(steps - 1) == schedule.rate(10 * steps)
    if name == "constant":
        assert set(rates) == {peak}
    else:
        assert rates[-1] == 0
        assert len(set(rates)) <= 8, "a compiled model should not be recompiled often"


def test_lors_holds_the_peak_and_then_descends_in_equal_rungs() -> None:
    ladder = Ladder(0.5, steps=100, hold=0.6, rungs=4)
    assert [ladder.rate(step) for step in (0, 59)] == [0.5, 0.5]
    for rung, rate in enumerate((0.375, 0.25, 0.125, 0.0)):
        assert {ladder.rate(step) for step in range(60 + 10 * rung, 70 + 10 * rung)} == {rate}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"peak": 1.0, "steps": 10}, r"in \[0, 1\), not 1.0"),
        ({"peak": 0.5, "steps": 0}, "at least one step"),
        ({"peak": 0.5, "steps": 10, "rungs": 0}, "at least one rung"),
        ({"peak": 0.5, "steps": 10, "hold": 1.0}, r"hold is .* in \[0, 1\)"),
    ],
)
def test_what_is_no_schedule_is_refused(settings: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Ladder(**settings)  # type: ignore[arg-type]
