import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving_sim.engine.training.schedule import (
    learning_rate_factor,
    position_by_steps,
    position_by_time,
)


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
def test_position_exceeds_one_only_after_the_last_step(steps: int) -> None:
    positions = [position_by_steps(step, steps) for step in range(steps + 1)]
    assert positions[0] == 0.0
    assert [position > 1.0 for position in positions] == [False] * steps + [True]
    assert steps == 1 or positions[-2] == 1.0


def factor(step: int, position: float, warmup_steps: int = 10) -> float:
    return learning_rate_factor(step, position, warmup_steps=warmup_steps, floor=0.05)


def test_rate_rises_to_the_peak_and_ends_at_the_floor() -> None:
    rates = [factor(step, position_by_steps(step, 1000)) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    peak = rates.index(max(rates))
    assert peak == 9
    assert rates[peak] == pytest.approx(1.0, abs=1e-3)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)


def test_short_run_reaches_the_peak_learning_rate() -> None:
    rates = [factor(step, position_by_steps(step, 50), warmup_steps=10_000) for step in range(50)]
    assert max(rates) > 0.95
    assert rates[-1] == pytest.approx(0.05)


def test_no_warm_up() -> None:
    assert factor(0, 0.0, warmup_steps=0) == 1.0


@given(limit=st.floats(1.0, 1e4), share=st.floats(1e-3, 2.0), slow_start=st.floats(1.0, 1.5))
def test_timed_run_ends_on_time(limit: float, share: float, slow_start: float) -> None:
    """Only a run of one step may end late, and no time is left for another step."""
    step_seconds = share * limit
    seconds, steps, position = 0.0, 0, 0.0
    while position <= 1.0:
        last_position = position
        seconds += step_seconds * (slow_start if steps == 0 else 1.0)
        steps += 1
        position = position_by_time(seconds, limit, step_seconds)
    assert seconds <= limit * (1 + 1e-9) or steps == 1
    assert seconds + step_seconds > limit
    assert steps == 1 or 1.0 - last_position <= step_seconds / (limit - step_seconds)
