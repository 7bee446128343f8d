"""The facts of a file: its reader, the times of its frames, and errors for unreadable files."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from driving_sim.data.video.file import VideoError
from driving_sim.data.video.file_facts import decord_installed, read_facts
from driving_sim.data.video.frame_rate import choose_frames, mean_rate
from tests import SHARED
from tests.fixtures.video_files import cut, needs_shared, write_numbered

X265 = {"x265-params": "log-level=none"}
needs_decord = pytest.mark.skipif(not decord_installed(), reason="no decord on this machine")


@needs_decord
@pytest.mark.parametrize(
    ("name", "codec"),
    [("x.mp4", "libx264"), ("x.mkv", "libx264"), ("x.webm", "libvpx-vp9"), ("x.mp4", "mpeg4")],
)
def test_plain_files_go_to_decord(tmp_path: Path, name: str, codec: str) -> None:
    facts = read_facts(write_numbered(tmp_path / name, codec=codec))
    assert facts.reader == "decord", facts.reason
    assert (facts.width, facts.height, len(facts.timestamps)) == (128, 48, 40)
    np.testing.assert_allclose(facts.timestamps, np.arange(40) / 20, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "codec", "container", "reason"),
    [
        ("x.mp4", "libx265", None, "codec hevc"),
        ("x.hevc", "libx265", "hevc", "container hevc"),
        ("x.ts", "libx264", "mpegts", "container mpegts"),
        ("x.avi", "libx264", "avi", "container avi"),
    ],
)
def test_files_that_decord_gets_wrong_go_to_pyav(
    tmp_path: Path, name: str, codec: str, container: str | None, reason: str
) -> None:
    options = X265 if codec == "libx265" else {}
    path = write_numbered(tmp_path / name, codec=codec, container=container, codec_options=options)
    facts = read_facts(path)
    assert (facts.reader, facts.reason) == ("pyav", reason)
    np.testing.assert_allclose(facts.timestamps, np.arange(40) / 20, atol=1e-3)


def test_open_groups_go_to_pyav(tmp_path: Path) -> None:
    options = {"x264-params": "open-gop=1:keyint=12:bframes=3"}
    facts = read_facts(write_numbered(tmp_path / "x.mp4", codec_options=options))
    assert (facts.reader, facts.reason) == ("pyav", "open groups of pictures")


def test_variable_rate_keeps_its_own_times(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(0).integers(20, 150, size=40)).tolist()
    facts = read_facts(write_numbered(tmp_path / "x.mp4", times_ms=times))
    np.testing.assert_allclose(facts.timestamps, (np.array(times) - times[0]) / 1000, atol=1e-3)


def test_edit_list_hides_its_frames(tmp_path: Path) -> None:
    times = [50 * number - 200 for number in range(40)]
    path = write_numbered(
        tmp_path / "x.mp4",
        times_ms=times,
        container_options={"avoid_negative_ts": "disabled"},
    )
    facts = read_facts(path)
    assert facts.reader == "pyav"
    assert "discarded" in facts.reason
    assert len(facts.timestamps) == 36


@needs_decord
@pytest.mark.parametrize(
    ("start_ms", "expected"),
    [
        (-50, ("pyav", "negative first timestamp")),
        (0, ("decord", "vp9 in mkv with plain timestamps")),
        (50, ("decord", "vp9 in mkv with plain timestamps")),
    ],
)
def test_files_that_begin_before_zero_go_to_pyav(
    tmp_path: Path, start_ms: int, expected: tuple[str, str]
) -> None:
    """All their frames are kept, with times that count from the first one."""
    path = write_numbered(
        tmp_path / "x.webm",
        codec="libvpx-vp9",
        times_ms=[50 * number + start_ms for number in range(40)],
        container_options={"avoid_negative_ts": "disabled"},
    )
    facts = read_facts(path)
    assert (facts.reader, facts.reason) == expected
    assert facts.pts is not None
    assert facts.pts[0] == start_ms
    np.testing.assert_allclose(facts.timestamps, np.arange(40) / 20, atol=1e-3)


def test_duplicate_times_count_once(tmp_path: Path) -> None:
    times = [50 * (number - (number == 7)) for number in range(20)]
    path = write_numbered(tmp_path / "x.mkv", times_ms=times, count=20, codec_options={"bf": "0"})
    facts = read_facts(path)
    assert facts.reader == "pyav"
    assert np.all(np.diff(facts.timestamps) > 0)


def test_a_file_without_its_last_frame_goes_to_pyav(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "x.mp4", container_options={"movflags": "+faststart"})
    with av.open(str(path)) as container:
        *_, last = (packet.size for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[:-last])
    facts = read_facts(path)
    assert (facts.reader, facts.reason) == ("pyav", "frame count differs from the header's")
    assert len(facts.timestamps) == 39


def test_long_files_go_to_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_numbered(tmp_path / "x.mp4")
    monkeypatch.setattr("driving_sim.data.video.file_facts._DECORD_FRAMES", 39)
    assert read_facts(path).reason == "more than 39 frames"


@needs_decord
def test_files_with_few_keyframes_go_to_pyav(tmp_path: Path) -> None:
    """decord gives no sign of life between keyframes: for minutes if a file has only one."""
    for name, every in (("one.mp4", 999), ("two.mp4", 300)):
        path, options = tmp_path / name, {"sc_threshold": "0"}
        write_numbered(path, count=301, keyframe_every=every, height=16, codec_options=options)
    facts = read_facts(tmp_path / "one.mp4")
    assert (facts.reader, facts.reason) == ("pyav", "more than 300 frames between keyframes")
    facts = read_facts(tmp_path / "two.mp4")
    assert (facts.reader, int(facts.keyframes[-1])) == ("decord", 300)


def test_without_decord_pyav_reads_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("driving_sim.data.video.file_facts.decord_installed", lambda: False)
    facts = read_facts(write_numbered(tmp_path / "x.mp4"))
    assert (facts.reader, facts.reason) == ("pyav", "decord is not installed")


def test_keyframes_are_where_decoding_can_begin(tmp_path: Path) -> None:
    facts = read_facts(write_numbered(tmp_path / "x.mp4", keyframe_every=12))
    assert facts.keyframes.tolist() == [0, 12, 24, 36]


def test_pixel_aspect_widens_the_display(tmp_path: Path) -> None:
    facts = read_facts(write_numbered(tmp_path / "x.mp4", aspect=Fraction(3, 2)))
    assert (facts.width, facts.height) == (192, 48)


def empty(folder: Path) -> Path:
    path = folder / "bad.mp4"
    path.touch()
    return path


def text(folder: Path) -> Path:
    path = folder / "bad.mp4"
    path.write_text("timestamp,speed,steering\n" * 200)
    return path


def cut_with_index(folder: Path) -> Path:
    options = {"movflags": "+faststart"}
    return cut(write_numbered(folder / "bad.mp4", container_options=options), 0.7)


def cut_without_index(folder: Path) -> Path:
    return cut(write_numbered(folder / "bad.mp4"), 0.7)


def cut_matroska(folder: Path) -> Path:
    return cut(write_numbered(folder / "bad.mkv"), 0.6)


def last_bytes_lost(folder: Path) -> Path:
    options = {"movflags": "+faststart"}
    path = write_numbered(folder / "bad.mp4", container_options=options)
    return cut(path, 1 - 10 / path.stat().st_size)


def audio_only(folder: Path) -> Path:
    path = folder / "bad.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44_100)
        assert isinstance(stream, av.AudioStream)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 44_100
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    return path


def no_frames(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=20)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        output.start_encoding()
    return path


def no_keyframe(folder: Path) -> Path:
    path = write_numbered(folder / "bad.ts", container="mpegts", keyframe_every=999)
    path.write_bytes(path.read_bytes()[188 * 20 :])
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "bad.mp4", "no such file"),
        (lambda folder: folder, "not a file"),
        (empty, "empty"),
        (text, "not a readable video"),
        (cut_with_index, "truncated: its frames end at"),
        (cut_without_index, "not a readable video|no video in this file"),
        (cut_matroska, "truncated: its frames end at"),
        (last_bytes_lost, "truncated: its last frame, at 2.0 s, is incomplete"),
        (audio_only, "no video in this file"),
        (lambda folder: no_frames(folder / "bad.mp4"), "no frames"),
        (lambda folder: no_frames(folder / "bad.mkv"), "not a readable video"),
        (no_keyframe, "not a readable video|can be decoded"),
    ],
)
def test_an_unreadable_file_gives_a_one_line_error(
    tmp_path: Path, make: Callable[[Path], Path], says: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(VideoError, match=says) as caught:
        read_facts(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message


@needs_shared
def test_real_drives_have_their_own_clock() -> None:
    facts = read_facts(SHARED / "track" / "drive_00.mp4")
    assert (facts.codec, facts.width, facts.height, len(facts.timestamps)) == (
        "h264",
        320,
        160,
        506,
    )
    segments = choose_frames(facts.timestamps).segments
    assert mean_rate(facts.timestamps, segments) == pytest.approx(14, abs=0.5)
    assert np.ptp(np.diff(facts.timestamps)) > 0.01
