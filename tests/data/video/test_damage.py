"""Damage costs the frames that it touches, and no others; none of them is passed on."""

from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.arrays import Pixels
from driving_sim.data.video import decoder_pool, reader
from driving_sim.data.video.file import VideoError
from driving_sim.data.video.file_facts import VideoFacts, read_facts
from tests.fixtures.video_files import damage, read_numbers, write_numbered, write_undecodable

COUNT, GROUP = 96, 12
X265 = {"x265-params": "log-level=none"}
OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=12:bframes=3"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}
PYRAMID = {"bf": "8", "x264-params": "b-adapt=0:b-pyramid=normal"}
KINDS = {
    "h264 in mp4": ("x.mp4", "libx264", {}),
    "many B-frames": ("x.mp4", "libx264", PYRAMID),
    "intra refresh": ("x.mp4", "libx264", REFRESH),
    "open groups": ("x.mp4", "libx264", OPEN_GROUPS),
    "h264 in mkv": ("x.mkv", "libx264", {}),
    "hevc": ("x.mp4", "libx265", X265),
    "vp9": ("x.webm", "libvpx-vp9", {}),
    "mpeg4": ("x.mp4", "mpeg4", {}),
}


def damaged_and_clean(
    folder: Path, kind: str, first: int, last: int, seed: int
) -> tuple[VideoFacts, list[Pixels | None], list[Pixels | None]]:
    """Return facts of a damaged file, its frames, and the frames that the file had before."""
    name, codec, options = KINDS[kind]
    path = write_numbered(
        folder / name, codec=codec, count=COUNT, keyframe_every=GROUP, codec_options=options
    )
    clean = list(reader.stream_frames(read_facts(path)))
    facts = read_facts(damage(path, first, last, seed))
    return facts, list(reader.stream_frames(facts)), clean


def lost_numbers(frames: list[Pixels | None]) -> list[int]:
    return [number for number, frame in enumerate(frames) if frame is None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "last"), [(48, 48), (51, 51), (57, 74)])
def test_damage_costs_a_stretch_and_no_garbled_frame_is_passed_on(
    tmp_path: Path, kind: str, first: int, last: int
) -> None:
    for seed in range(2):
        facts, frames, clean = damaged_and_clean(tmp_path, kind, first, last, seed)
        assert len(frames) == len(clean) == COUNT
        lost = lost_numbers(frames)
        assert lost
        # Frames are stored in another order than they are displayed.
        assert first - first % GROUP - 2 * facts.reordering <= min(lost)
        assert max(lost) < last - last % GROUP + 2 * GROUP
        for frame, expected in zip(frames, clean, strict=True):
            if frame is not None:
                np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("first", [0, 84])
def test_damage_at_either_end_costs_no_more(tmp_path: Path, first: int) -> None:
    facts, frames, _ = damaged_and_clean(tmp_path, "h264 in mp4", first, first + 2, 0)
    assert len(facts.timestamps) == COUNT
    lost = lost_numbers(frames)
    assert lost
    assert set(lost) <= set(range(first - 3, first + GROUP))


def test_losses_arrive_from_a_decoder_process(tmp_path: Path) -> None:
    facts, frames, _ = damaged_and_clean(tmp_path, "h264 in mp4", 48, 50, 0)
    lost = lost_numbers(frames)
    streamed = list(decoder_pool.stream_frames(facts))
    assert lost_numbers(streamed) == lost
    intact = [number for number in range(COUNT) if number not in lost]
    assert read_numbers(decoder_pool.stream_frames(facts, indices=intact)) == intact
    sparse = list(decoder_pool.stream_frames(facts, indices=[3, lost[1], 90]))
    assert [frame is None for frame in sparse] == [False, True, False]


def test_a_clip_of_damaged_frames_is_an_error(tmp_path: Path) -> None:
    facts, frames, _ = damaged_and_clean(tmp_path, "hevc", 48, 50, 0)
    lost = lost_numbers(frames)
    assert facts.reader == "pyav"
    assert read_numbers(reader.read_frames(facts, [90, 5])) == [90, 5]
    with pytest.raises(VideoError, match=rf"frame {lost[0]}: it is damaged\): .* cut it there"):
        reader.read_frames(facts, [5, lost[0]])


@pytest.mark.parametrize("packets", [6, 30])
def test_a_hole_in_a_transport_stream_costs_what_depends_on_it(
    tmp_path: Path, packets: int
) -> None:
    """Whole frames are missing, and the decoder does not always notice it."""
    path = write_numbered(tmp_path / "x.ts", container="mpegts", count=COUNT)
    facts, content = read_facts(path), path.read_bytes()
    clean = zip(facts.timestamps.round(3), reader.stream_frames(facts), strict=True)
    frame_at = dict(clean)
    for start in range(100, 160, 6):
        path.write_bytes(content[: 188 * start] + content[188 * (start + packets) :])
        facts = read_facts(path)
        frames = list(reader.stream_frames(facts))
        assert len(lost_numbers(frames)) < 2 * GROUP
        for time, frame in zip(facts.timestamps.round(3), frames, strict=True):
            if frame is not None:
                np.testing.assert_array_equal(frame, frame_at[time])


def test_damage_that_only_the_decoder_hides_is_found(tmp_path: Path) -> None:
    """It conceals the damage of a keyframe and reports no error."""
    _, frames, _ = damaged_and_clean(tmp_path, "h264 in mp4", 48, 48, 0)
    assert set(range(48, 60)) <= set(lost_numbers(frames))


def test_a_damaged_raw_stream_is_refused(tmp_path: Path) -> None:
    """It has no times, so nothing says which frames are lost."""
    facts = read_facts(write_undecodable(tmp_path / "x.hevc"))
    with pytest.raises(VideoError, match=r"x\.hevc: decoding stopped at .* damaged"):
        list(reader.stream_frames(facts))


def test_clips_that_begin_at_damage_read_no_more_than_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, frames, _ = damaged_and_clean(tmp_path, "h264 in mp4", 60, 60, 0)
    beats: list[int] = []
    monkeypatch.setattr(reader, "beat", lambda: beats.append(1))
    number = lost_numbers(frames)[-1]
    assert list(reader.stream_frames(facts, indices=[number])) == [None]
    assert len(beats) < 4 * 3 * GROUP
