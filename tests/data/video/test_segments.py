"""Segments: where a drive is cut, and what lies between the cuts."""

import numpy as np

from driving_sim.data.video.segments import clipped, cut, within_segments


def test_segments_end_at_gaps_and_cover_everything() -> None:
    assert cut(6, np.array([0, 1, 0, 1, 0], np.bool_)) == [(0, 2), (2, 4), (4, 6)]
    assert cut(1, np.array([], np.bool_)) == [(0, 1)]
    assert cut(0, np.array([], np.bool_)) == []


def test_a_pair_across_a_gap_is_in_no_segment() -> None:
    assert within_segments([(0, 2), (2, 3), (3, 6)]).tolist() == [True, False, False, True, True]
    assert within_segments([(0, 1)]).tolist() == []


def test_clipped_segments_count_from_the_first_frame_kept() -> None:
    segments = [(0, 4), (4, 9), (9, 12)]
    assert clipped(segments, 2, 10) == [(0, 2), (2, 7), (7, 8)]
    assert clipped(segments, 0, 4) == [(0, 4)]
    assert clipped(segments, 0, 12) == segments
