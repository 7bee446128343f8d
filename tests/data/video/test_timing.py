"""Times come from the file's clock, which may start again; a made-up frame rate is named."""

import re
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.video import decoder_pool
from driving_sim.data.video.file_facts import VideoFacts, read_facts
from driving_sim.data.video.frame_rate import choose_frames
from driving_sim.data.video.reader import read_frames, stream_frames
from driving_sim.data.video.timing import RESTART_GAP_S
from tests.fixtures.video_files import read_number, read_numbers, write_numbered

QUIET = "log-level=none"


def joined(folder: Path, name: str, starts_ms: list[int], lost_packets: int = 0) -> Path:
    """Write parts of 40 frames that begin at these times, and join them byte by byte."""
    container = "mpegts" if name.endswith("ts") else None
    parts = [
        write_numbered(
            folder / f"part-{name}",
            container=container,
            times_ms=range(start, start + 2000, 50),
            first=40 * number,
            codec_options={"bf": "2"},
        ).read_bytes()
        for number, start in enumerate(starts_ms)
    ]
    path = folder / name
    path.write_bytes(parts[0] + b"".join(part[188 * lost_packets :] for part in parts[1:]))
    return path


@pytest.mark.parametrize(
    ("name", "starts_ms"),
    [
        ("x.ts", [0, 0]),
        ("x.ts", [5000, 0, 0]),
        ("x.ts", [300_000, 0]),  # FFmpeg takes this for a clock of 33 bits that wrapped around.
        ("x.ts", [61_000, 0]),  # FFmpeg stops to take it for that within the second part.
        ("x.ts", [0, 1725]),
        ("x.mkv", [0, 0]),
        ("x.mkv", [0, 1725]),
    ],
)
def test_a_clock_that_starts_again_goes_on_after_a_gap(
    tmp_path: Path, name: str, starts_ms: list[int]
) -> None:
    facts = decoder_pool.read_facts(joined(tmp_path, name, starts_ms))
    parts = len(starts_ms)
    assert len(facts.timestamps) == 40 * parts
    steps = np.diff(facts.timestamps)
    gaps = np.flatnonzero(steps > 1)
    assert gaps.tolist() == [39 + 40 * part for part in range(parts - 1)]
    np.testing.assert_allclose(steps[gaps], RESTART_GAP_S, atol=0.3)
    np.testing.assert_allclose(np.delete(steps, gaps), 0.05, atol=1e-3)
    assert len(choose_frames(facts.timestamps, fps=0.5).segments) == parts
    assert read_numbers(stream_frames(facts)) == list(range(40 * parts))
    for numbers in ([70, 3, 45], [30], [38], [79]):
        assert read_numbers(read_frames(facts, numbers)) == numbers
    assert read_numbers(decoder_pool.stream_frames(facts, indices=[3, 45])) == [3, 45]
    (notice,) = facts.notices
    again = " and 1 more times" if parts == 3 else ""
    assert re.match(rf"its clock starts again after (1\.9|2\.0) s{again} \(", notice)
    assert (facts.reader, len(facts.restarts)) == ("pyav", parts - 1)


def test_a_joined_part_may_lack_its_first_keyframe(tmp_path: Path) -> None:
    facts = read_facts(joined(tmp_path, "x.ts", [0, 0], lost_packets=20))
    frames = list(stream_frames(facts))
    late = [frame for frame, time in zip(frames, facts.timestamps, strict=True) if time > 5]
    intact = [read_number(frame) for frame in late if frame is not None]
    assert intact[-20:] == list(range(60, 80))
    assert read_numbers(frames[: 40 - facts.reordering]) == list(range(40 - facts.reordering))


def test_a_clock_that_stutters_does_not_start_again(tmp_path: Path) -> None:
    times = [50 * number - 20 * (number % 7 == 3) for number in range(40)]
    facts = read_facts(write_numbered(tmp_path / "x.ts", container="mpegts", times_ms=times))
    assert (len(facts.restarts), facts.notices) == (0, ())


def raw(folder: Path, codec: str, *, with_rate: bool) -> Path:
    match codec:
        case "hevc":
            rate = "" if with_rate else ":vui-timing-info=0"
            options = {"x265-params": QUIET + rate}
            return write_numbered(
                folder / "x.hevc", codec="libx265", container="hevc", codec_options=options
            )
        case _:
            # Without constant rate, x264 stores the ticks of a clock, which are no frame rate.
            options = {"x264-params": "force-cfr=1"} if with_rate else {}
            return write_numbered(folder / "x.h264", container="h264", codec_options=options)


@pytest.mark.parametrize("codec", ["hevc", "h264"])
def test_a_rate_that_no_file_contains_is_named_and_can_be_set(tmp_path: Path, codec: str) -> None:
    path = raw(tmp_path, codec, with_rate=False)
    facts = read_facts(path)
    np.testing.assert_allclose(facts.timestamps, np.arange(40) / 25)
    assert not facts.has_own_times
    assert facts.notices == (
        "its frame rate is not stored; 25 frames/s are assumed (set it with `video_fps`)",
    )
    facts = decoder_pool.read_facts(path, video_fps=20)
    np.testing.assert_allclose(facts.timestamps, np.arange(40) / 20)
    assert facts.notices == (
        "its frame rate is not stored; 20 frames/s are taken, as `video_fps` says",
    )
    assert read_numbers(stream_frames(facts, indices=[0, 39])) == [0, 39]


@pytest.mark.parametrize("codec", ["hevc", "h264"])
def test_a_stored_rate_is_no_assumption(tmp_path: Path, codec: str) -> None:
    path = raw(tmp_path, codec, with_rate=True)
    facts = read_facts(path)
    np.testing.assert_allclose(facts.timestamps, np.arange(40) / 20)
    assert (facts.has_own_times, facts.notices) == (True, ())


def test_a_raw_stream_whose_times_ffmpeg_invents_is_no_exception(tmp_path: Path) -> None:
    path = write_numbered(
        tmp_path / "x.avi", codec="mjpeg", container="mjpeg", pixel_format="yuvj420p"
    )
    facts = read_facts(path, video_fps=10)
    np.testing.assert_allclose(facts.timestamps, np.arange(40) / 10)
    assert "10 frames/s are taken" in facts.notices[0]
    assert read_numbers(stream_frames(facts, indices=[0, 39])) == [0, 39]


@pytest.mark.parametrize("name", ["x.mp4", "x.hevc"])
def test_a_rate_is_not_applied_to_files_that_store_theirs(tmp_path: Path, name: str) -> None:
    path = (
        write_numbered(tmp_path / name)
        if name == "x.mp4"
        else raw(tmp_path, "hevc", with_rate=True)
    )
    facts = read_facts(path, video_fps=7)
    np.testing.assert_allclose(facts.timestamps, np.arange(40) / 20, atol=1e-3)
    (notice,) = facts.notices
    assert notice.startswith("`video_fps` is not used")


def test_known_times_replace_an_assumed_rate(tmp_path: Path) -> None:
    facts = read_facts(raw(tmp_path, "hevc", with_rate=False))
    timed = facts.timed(np.arange(40) / 10, "the times are known")
    assert isinstance(timed, VideoFacts)
    assert (timed.notices, timed.has_own_times) == (("the times are known",), True)
    np.testing.assert_allclose(timed.timestamps, np.arange(40) / 10)


def test_frames_before_the_first_keyframe_are_named(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "x.ts", container="mpegts")
    path.write_bytes(path.read_bytes()[188 * 20 :])
    facts = read_facts(path)
    left_out = 40 - len(facts.timestamps)
    (notice,) = facts.notices
    assert "cannot be decoded and are left out" in notice
    assert 0 < int(notice.split()[2]) <= left_out


def test_frames_with_the_time_of_another_are_named(tmp_path: Path) -> None:
    times = [50 * (number - (number == 7)) for number in range(20)]
    path = write_numbered(tmp_path / "x.mkv", times_ms=times, count=20, codec_options={"bf": "0"})
    assert read_facts(path).notices == ("1 frame has the time of another frame and is left out",)


def test_interlaced_pictures_are_named(tmp_path: Path) -> None:
    for name, options in (("x.mp4", {"x264-params": "tff=1"}), ("plain.mp4", {})):
        facts = read_facts(write_numbered(tmp_path / name, height=64, codec_options=options))
        notices = [notice for notice in facts.notices if "interlaced" in notice]
        assert len(notices) == (name == "x.mp4")
        assert read_numbers(stream_frames(facts)) == list(range(40))
