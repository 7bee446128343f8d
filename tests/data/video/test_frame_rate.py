"""The frame rate of a drive, and the frames chosen for a lower rate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving_sim.data.video.frame_rate import choose_frames, mean_rate
from driving_sim.data.video.segments import median_period


def jittered(
    rate: float, count: int = 200, seed: int = 0
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    jitter = np.random.default_rng(seed).uniform(-0.2, 0.2, size=count)
    return np.sort((np.arange(count) + jitter) / rate)


def test_rate_ignores_a_gap() -> None:
    times = np.concatenate([np.arange(50) / 20, 100 + np.arange(50) / 20])
    assert choose_frames(times).segments == [(0, 50), (50, 100)]
    assert mean_rate(times, choose_frames(times).segments) == pytest.approx(20)
    assert median_period(times[:1]) == mean_rate(times[:1], [(0, 1)]) == 0.0


@pytest.mark.parametrize(
    ("rate", "fps", "stride"), [(14, 7, 2), (30, 10, 3), (25, 13, 2), (20, 19, 1)]
)
def test_a_rate_near_a_whole_fraction_is_a_constant_stride(
    rate: float, fps: float, stride: int
) -> None:
    chosen = choose_frames(jittered(rate), fps=fps)
    assert not chosen.on_ticks
    assert chosen.indices.tolist() == list(range(0, 200, stride))


def test_another_rate_is_the_nearest_frame_to_each_tick() -> None:
    times = jittered(14)
    chosen, segments, on_ticks = choose_frames(times, fps=10)
    assert on_ticks
    assert segments == [(0, len(chosen))]
    ticks = np.arange(len(chosen)) / 10 + times[0]
    distance = np.abs(times[None] - ticks[:, None])
    assert np.array_equal(chosen, distance.argmin(axis=1))
    assert mean_rate(times[chosen], [(0, len(chosen))]) == pytest.approx(10, rel=0.01)


def test_every_is_the_stride_and_a_higher_rate_keeps_all() -> None:
    times = jittered(14)
    assert choose_frames(times, every=3).indices.tolist() == list(range(0, 200, 3))
    for all_frames in (choose_frames(times, fps=60), choose_frames(times)):
        assert all_frames.indices.tolist() == list(range(200))


FRAMES_30 = np.arange(900) / 30


def test_dropped_frames_are_no_gap_at_a_lower_rate() -> None:
    """30 frames/s of which a fourth was dropped at random: nearly every tick of 10/s has one."""
    times = FRAMES_30[np.random.default_rng(0).uniform(size=900) > 0.25]
    assert len(choose_frames(times).segments) > 100
    chosen, segments, _ = choose_frames(times, fps=10)
    assert sum(stop - start for start, stop in segments if stop - start >= 10) > 0.9 * len(chosen)
    assert len(segments) < 10
    assert np.diff(times[chosen]).mean() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("dark", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dark_rate", [9.8, 10, 15])
def test_a_lower_rate_in_the_dark_is_no_gap(dark: float, dark_rate: float) -> None:
    """Frames come at 30/s in the light, and 10 frames/s are asked for."""
    light = np.arange(round(300 * (1 - dark)) * 30) / 30
    night = light[-1] + np.arange(1, round(300 * dark * dark_rate)) / dark_rate
    times = np.concatenate([light, night])
    chosen, segments, _ = choose_frames(times, fps=10)
    assert segments == [(0, len(chosen))]
    assert len(chosen) == pytest.approx(3000, rel=0.02)


def test_a_pause_of_years_costs_no_memory() -> None:
    times = np.concatenate([np.arange(100) / 14, 1.7e9 + np.arange(100) / 14])
    chosen, segments, on_ticks = choose_frames(times, fps=10)
    assert on_ticks
    assert len(segments) == 2
    assert len(chosen) == pytest.approx(2 * 72, abs=2)


def test_a_few_lost_frames_leave_a_constant_stride() -> None:
    times = np.delete(FRAMES_30, [100, 500])
    chosen = choose_frames(times, fps=10)
    assert not chosen.on_ticks
    assert chosen.segments == [(0, len(chosen.indices))]


@pytest.mark.parametrize("fps", [10, 7])
def test_a_second_without_frames_is_one_gap(fps: float) -> None:
    times = np.concatenate([FRAMES_30[:300], 11 + FRAMES_30[:300]])
    chosen, segments, _ = choose_frames(times, fps=fps)
    (_, cut), (start, stop) = segments
    assert cut == start
    assert times[chosen[cut - 1]] < 10 < 11 <= times[chosen[cut]]
    assert stop == len(chosen)


def test_a_slower_video_is_judged_by_its_own_period() -> None:
    """No frame of 6/s is within half a period of every tick of 10/s, but none is missing."""
    times = jittered(6)
    assert choose_frames(times, fps=10).segments == [(0, 200)]
    without = np.delete(times, [50, 51])
    assert choose_frames(without, fps=10).segments == [(0, 50), (50, 198)]


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
    chosen, segments, _ = choose_frames(times, fps=fps)
    assert np.all(np.diff(chosen) > 0)
    assert [frame for run in segments for frame in range(*run)] == list(range(len(chosen)))
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
