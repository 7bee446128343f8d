"""Hostile files are refused, because of their headers or the files that they refer to."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.video import file as video_file
from driving_sim.data.video.file import VideoError, check_times
from driving_sim.data.video.file_facts import read_facts
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.reader import read_frames, stream_frames
from tests.fixtures.video_files import (
    change_size_midway,
    claim_frames,
    claim_size,
    read_numbers,
    write_numbered,
)


@pytest.mark.parametrize("side", [8200, 100_000])
def test_a_picture_too_large_by_its_header_is_not_decoded(tmp_path: Path, side: int) -> None:
    path = claim_size(tmp_path / "x.avi", side, side)
    with pytest.raises(VideoError, match=r"x\.avi: not a readable .* more than 67,108,864 pixels"):
        read_facts(path)


def test_a_picture_too_large_in_a_format_without_a_header_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered(tmp_path / "x.ts", container="mpegts")
    monkeypatch.setattr(video_file, "MAX_PIXELS", 48 * 128 - 1)
    with pytest.raises(
        VideoError, match=r"x\.ts: its pictures have 128×48 pixels, but at most 6,143"
    ):
        read_facts(path)


def test_a_picture_may_be_as_large_as_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_file, "MAX_PIXELS", 48 * 128)
    video_file.check_picture(Path("x"), 48, 128)
    with pytest.raises(VideoError, match="at most 6,144"):
        video_file.check_picture(Path("x"), 48, 129)


def test_a_picture_that_grows_midway_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = read_facts(change_size_midway(tmp_path / "x.h264"))
    assert len(list(stream_frames(facts))) == 24
    monkeypatch.setattr(video_file, "MAX_PIXELS", 10_000)
    with pytest.raises(VideoError, match="decoding stopped"):
        list(stream_frames(facts))


def test_a_picture_may_not_exceed_the_limit_when_displayed_or_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_file, "MAX_PIXELS", 10_000)
    with pytest.raises(VideoError, match="256×48 pixels"):
        read_facts(write_numbered(tmp_path / "wide.mp4", aspect=Fraction(2, 1)))
    facts = read_facts(write_numbered(tmp_path / "x.mp4"))
    fits, grows = FrameSize(height=48, width=64), FrameSize(height=96, width=96)
    streamed = next(stream_frames(facts, fits))
    assert streamed is not None
    assert streamed.shape == read_frames(facts, [0], fits)[0].shape
    with pytest.raises(VideoError, match="256×96 pixels"):
        next(stream_frames(facts, grows))
    with pytest.raises(VideoError, match="256×96 pixels"):
        read_frames(facts, [0], grows)


def test_a_million_frames_in_a_kilobyte_are_not_believed(tmp_path: Path) -> None:
    path = claim_frames(tmp_path / "x.mp4", 1_000_000)
    assert path.stat().st_size < 2_000
    with pytest.raises(VideoError, match=r"x\.mp4: claims 1,000,000 frames in 1,\d+ bytes"):
        read_facts(path)


def test_packets_are_counted_where_no_header_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered(tmp_path / "x.ts", container="mpegts", count=40)
    monkeypatch.setattr(video_file, "MAX_FRAMES", 40)
    assert len(read_facts(path).timestamps) == 40
    monkeypatch.setattr(video_file, "MAX_FRAMES", 20)
    with pytest.raises(VideoError, match="claims 21 frames"):
        read_facts(path)


def test_times_that_no_recording_has_are_refused(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "x.mkv", count=3, times_ms=[0, 50, 8 * 86_400_000])
    with pytest.raises(VideoError, match="span more than 7 days"):
        read_facts(path)
    check_times(path, np.array([0.0]))
    for times in ([0.0, 1.0, 1.0], [0.0, -1e13], [0.0, np.nan], [np.nan]):
        with pytest.raises(VideoError, match="do not increase"):
            check_times(path, np.array(times))


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile whole.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nwhole.ts\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_of_other_files_is_not_a_video(tmp_path: Path, text: str) -> None:
    write_numbered(tmp_path / "whole.mp4")
    write_numbered(tmp_path / "whole.ts", container="mpegts")
    (tmp_path / "x.mp4").write_text(text)
    with pytest.raises(VideoError, match="not a readable video"):
        read_facts(tmp_path / "x.mp4")


@pytest.mark.parametrize("name", ["12:30:05.mp4", "concat:x.mp4", "http:x.mp4"])
def test_a_name_with_a_colon_is_not_a_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_numbered(tmp_path / "plain.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    facts = read_facts(Path(name))
    assert read_numbers(list(stream_frames(facts, indices=[0, 7]))) == [0, 7]
    assert read_numbers(read_frames(facts, [7, 0])) == [7, 0]


def test_a_title_may_be_in_any_encoding(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "x.mkv")
    content = path.read_bytes()
    assert b"Lavf" in content
    path.write_bytes(content.replace(b"Lavf", b"\xe9\xff\xfev"))
    assert len(read_facts(path).timestamps) == 40


def test_an_unsupported_codec_is_an_error(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "x.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(VideoError, match="its codec is not supported"):
        read_facts(path)
