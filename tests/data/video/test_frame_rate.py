"""The frame rate of a drive, and the frames chosen for a lower rate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving_sim.data.video.frame_rate import choose_frames, mean_rate
from driving_sim.data.video.segments import gaps, median_period


def jittered(
    rate: float, count: int = 200, seed: int = 0
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    jitter = np.random.default_rng(seed).uniform(-0.2, 0.2, size=count)
    return np.sort((np.arange(count) + jitter) / rate)


def test_rate_ignores_a_gap() -> None:
    times = np.concatenate([np.arange(50) / 20, 100 + np.arange(50) / 20])
    assert mean_rate(times, gaps(times)) == pytest.approx(20)
    assert median_period(times[:1]) == mean_rate(times[:1], [(0, 1)]) == 0.0


@pytest.mark.parametrize(
    ("rate", "fps", "stride"), [(14, 7, 2), (30, 10, 3), (25, 13, 2), (20, 19, 1)]
)
def test_a_rate_near_a_whole_fraction_is_a_constant_stride(
    rate: float, fps: float, stride: int
) -> None:
    chosen = choose_frames(jittered(rate), fps=fps)
    assert chosen.tolist() == list(range(0, 200, stride))


def test_another_rate_is_the_nearest_frame_to_each_tick() -> None:
    times = jittered(14)
    chosen = choose_frames(times, fps=10)
    ticks = np.arange(len(chosen)) / 10 + times[0]
    distance = np.abs(times[None] - ticks[:, None])
    assert np.array_equal(chosen, distance.argmin(axis=1))
    assert mean_rate(times[chosen], [(0, len(chosen))]) == pytest.approx(10, rel=0.01)


def test_every_is_the_stride_and_a_higher_rate_keeps_all() -> None:
    times = jittered(14)
    assert choose_frames(times, every=3).tolist() == list(range(0, 200, 3))
    assert (
        choose_frames(times, fps=60).tolist() == choose_frames(times).tolist() == list(range(200))
    )


@given(
    rate=st.floats(1, 60),
    fps=st.floats(0.5, 60),
    count=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
def test_chosen_frames_increase_from_the_first(
    rate: float, fps: float, count: int, seed: int
) -> None:
    times = jittered(rate, count, seed)
    chosen = choose_frames(times, fps=fps)
    assert np.all(np.diff(chosen) > 0)
    assert chosen[:1].tolist() == ([0] if count else [])
    assert np.all(chosen < count)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"fps": 0.0}, "fps"), ({"fps": float("nan")}, "fps"), ({"every": 0}, "every")],
)
def test_a_rate_that_makes_no_sense_is_named(arguments: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        choose_frames(jittered(14), **arguments)  # type: ignore[arg-type]


def test_fps_and_every_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give only one"):
        choose_frames(jittered(14), fps=7, every=2)
