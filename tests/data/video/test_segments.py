"""Segments: where a drive is cut, and what lies between the cuts."""

import numpy as np

from driving_sim.data.video.segments import clipped, cut, isolated, within_segments


def test_segments_end_at_gaps_and_cover_everything() -> None:
    assert cut(6, np.array([0, 1, 0, 1, 0], np.bool_)) == [(0, 2), (2, 4), (4, 6)]
    assert cut(1, np.array([], np.bool_)) == [(0, 1)]
    assert cut(0, np.array([], np.bool_)) == []


def test_a_pair_across_a_gap_is_in_no_segment() -> None:
    assert within_segments([(0, 2), (2, 3), (3, 6)]).tolist() == [True, False, False, True, True]
    assert within_segments([(0, 1)]).tolist() == []


def test_each_lost_frame_is_a_segment_of_its_own() -> None:
    lost = np.array([0, 0, 1, 0, 0, 1, 1], np.bool_)
    segments = isolated([(0, 4), (4, 7)], lost)
    assert segments == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    assert isolated([(0, 4), (4, 7)], np.zeros(7, np.bool_)) == [(0, 4), (4, 7)]


def test_clipped_segments_count_from_the_first_frame_kept() -> None:
    segments = [(0, 4), (4, 9), (9, 12)]
    assert clipped(segments, 2, 10) == [(0, 2), (2, 7), (7, 8)]
    assert clipped(segments, 0, 4) == [(0, 4)]
    assert clipped(segments, 0, 12) == segments
