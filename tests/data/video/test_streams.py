"""One video stream of a file is read, always the same one, and the others are named."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from driving_sim.data.video import decoder_pool, file_facts
from driving_sim.data.video.file import VideoError
from driving_sim.data.video.reader import read_frames, stream_frames
from tests.fixtures.video_files import (
    HEIGHT,
    WIDTH,
    numbered,
    read_numbers,
    write_numbered,
    write_streams,
)

FRONT, REAR = range(40), range(100, 140)


def stored(frames: list[int] | range, facts: file_facts.VideoFacts) -> None:
    """Check that whole videos and clips both show these numbers."""
    assert read_numbers(list(stream_frames(facts))) == list(frames)
    assert read_numbers(read_frames(facts, [30, 7])) == [frames[30], frames[7]]
    assert read_numbers(decoder_pool.stream_frames(facts)) == list(frames)
    assert read_numbers(decoder_pool.read_frames(facts, [30, 7])) == [frames[30], frames[7]]


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_whole_videos_and_clips_come_from_the_same_stream(tmp_path: Path, name: str) -> None:
    path = write_streams(tmp_path / name, [FRONT, REAR])
    with av.open(str(path)) as container:
        best = container.streams.best("video")
        assert best is not None
        number = best.index
    facts = file_facts.read_facts(path)
    assert (facts.stream, facts.reader, facts.reason) == (
        number,
        "pyav",
        "several video streams",
    )
    stored([FRONT, REAR][facts.stream], facts)
    (notice,) = facts.notices
    assert notice == (
        f"of its 2 video streams, stream {facts.stream} (h264 {facts.width}×48) is read; left out: "
        f"stream {1 - facts.stream} (h264 {272 - facts.width}×48) (choose with `stream`)"
    )


def test_a_stream_can_be_chosen(tmp_path: Path) -> None:
    path = write_streams(tmp_path / "x.mp4", [FRONT, REAR])
    for number, frames in enumerate((FRONT, REAR)):
        facts = decoder_pool.read_facts(path, stream=number)
        assert (facts.stream, facts.width) == (number, WIDTH + 16 * number)
        stored(frames, facts)
        assert f"stream {1 - number} (h264" in facts.notices[0]


def test_a_stream_that_does_not_exist_is_a_one_line_error(tmp_path: Path) -> None:
    path = write_streams(tmp_path / "x.mp4", [FRONT, REAR])
    for read_facts in (file_facts.read_facts, decoder_pool.read_facts):
        with pytest.raises(
            VideoError,
            match=r"x\.mp4: has no video stream 2; .*stream 0 \(h264 128×48\), stream 1 .*`stream`",
        ) as error:
            read_facts(path, stream=2)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_a_single_picture_is_no_video(tmp_path: Path, name: str) -> None:
    """The header of an MP4 counts the pictures; those of an MKV must be counted."""
    path = write_streams(tmp_path / name, [[77], FRONT])
    facts = file_facts.read_facts(path)
    assert facts.stream == 1
    stored(FRONT, facts)
    assert "stream 0 (h264 128×48" in facts.notices[0]


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "plain.mp4")
    covered = tmp_path / "x.mp4"
    with av.open(str(path)) as source, av.open(str(covered), "w") as output:
        cover = output.add_stream("mjpeg", rate=1)
        assert isinstance(cover, av.VideoStream)
        cover.width, cover.height, cover.pix_fmt = 4 * WIDTH, 4 * HEIGHT, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        video = output.add_stream_from_template(source.streams.video[0])
        picture = av.VideoFrame.from_ndarray(numbered(99, 4 * HEIGHT, 4 * WIDTH), format="rgb24")
        picture.pts, picture.time_base = 0, Fraction(1, 1)
        output.mux(cover.encode(picture))
        output.mux(cover.encode(None))
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                output.mux(packet)
    facts = file_facts.read_facts(covered)
    assert facts.codec == "h264"
    stored(FRONT, facts)
    number = 1 - facts.stream
    assert f"left out: stream {number} (mjpeg 512×192, a single picture)" in facts.notices[0]


def test_a_plain_file_has_no_notice(tmp_path: Path) -> None:
    facts = decoder_pool.read_facts(write_numbered(tmp_path / "x.mp4"))
    assert (facts.stream, facts.notices) == (0, ())
    assert (facts.has_own_times, facts.mirrored, len(facts.restarts)) == (True, False, 0)
    np.testing.assert_allclose(facts.timestamps, np.arange(40) / 20, atol=1e-3)
