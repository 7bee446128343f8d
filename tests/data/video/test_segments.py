"""Segments: where a drive is cut, and where the frames chosen from it are cut."""

import numpy as np
import pytest

from driving_sim.data.video.frame_rate import choose_frames, mean_rate
from driving_sim.data.video.segments import chosen_segments, clipped, gaps, within_segments


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
    assert chosen[cut - 1] < lost <= chosen[cut]  # `lost` now numbers the frame after the gap.
    assert stop == len(chosen)


def test_a_gap_after_the_last_chosen_frame_cuts_nothing() -> None:
    times = np.array([0, 1, 2, 3, 4, 9], dtype=np.float64)
    assert chosen_segments(times, np.array([0, 2, 4])) == [(0, 3)]
    assert chosen_segments(times, np.array([0, 5])) == [(0, 1), (1, 2)]
    assert chosen_segments(times, np.array([], np.int64)) == []


def test_a_pair_across_a_gap_is_in_no_segment() -> None:
    assert within_segments([(0, 2), (2, 3), (3, 6)]).tolist() == [True, False, False, True, True]
    assert within_segments([(0, 1)]).tolist() == []


def test_clipped_segments_count_from_the_first_frame_kept() -> None:
    segments = [(0, 4), (4, 9), (9, 12)]
    assert clipped(segments, 2, 10) == [(0, 2), (2, 7), (7, 8)]
    assert clipped(segments, 0, 4) == [(0, 4)]
    assert clipped(segments, 0, 12) == segments
