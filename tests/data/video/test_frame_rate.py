"""Frame times: which frames serve a lower rate, and where a drive is cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving_sim.data.video.frame_rate import (
    choose_frames,
    chosen_segments,
    gaps,
    mean_rate,
    median_period,
)


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
    with pytest.raises(ValueError, match="give one"):
        choose_frames(jittered(14), fps=7, every=2)


def test_segments_end_at_gaps_and_cover_everything() -> None:
    times = np.array([0, 1, 2, 3.4, 5.0, 6, 7, 8, 11, 12, 22], dtype=np.float64)
    assert gaps(times) == [(0, 4), (4, 8), (8, 10), (10, 11)]
    assert gaps(times[:1]) == [(0, 1)]
    assert gaps(times[:0]) == []


def test_frames_chosen_unevenly_from_a_steady_drive_are_one_segment() -> None:
    times = np.arange(200) / 14
    chosen = choose_frames(times, fps=10)
    assert set(np.diff(chosen)) == {1, 2}
    assert chosen_segments(times, chosen) == [(0, len(chosen))]
    assert mean_rate(times[chosen], [(0, len(chosen))]) == pytest.approx(10, rel=0.005)


@pytest.mark.parametrize("lost", [30, 31])
def test_a_lost_frame_cuts_the_frames_chosen_around_it(lost: int) -> None:
    times = np.delete(np.arange(200) / 14, lost)
    chosen = choose_frames(times, every=2)
    (_, cut), (start, stop) = chosen_segments(times, chosen)
    assert cut == start
    assert chosen[cut - 1] < lost <= chosen[cut]  # frame `lost` is now the one after the gap
    assert stop == len(chosen)


def test_a_gap_after_the_last_chosen_frame_cuts_nothing() -> None:
    times = np.array([0, 1, 2, 3, 4, 9], dtype=np.float64)
    assert chosen_segments(times, np.array([0, 2, 4])) == [(0, 3)]
    assert chosen_segments(times, np.array([0, 5])) == [(0, 1), (1, 2)]
    assert chosen_segments(times, np.array([], np.int64)) == []
