"""Both readers return the requested frames, equal and in order, or a one-line error."""

import os
import pickle
import struct
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from av.video.stream import VideoStream

from driving_sim.data.arrays import Pixels
from driving_sim.data.video import reader as video
from driving_sim.data.video.file import VideoError, video_stream
from driving_sim.data.video.file_facts import VideoFacts, decord_installed, read_facts
from driving_sim.data.video.frame_size import FrameSize, fit, transform_description
from driving_sim.data.video.reader import _read_decord, _read_pyav, read_frames, stream_frames
from driving_sim.data.video.writer import write_video
from tests import SHARED
from tests.fixtures.video_files import (
    cut,
    needs_shared,
    numbered,
    read_number,
    read_numbers,
    write_numbered,
)

needs_decord = pytest.mark.skipif(not decord_installed(), reason="no decord on this machine")
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
X265 = {"x265-params": "log-level=none:keyint=12:open-gop=1:bframes=3"}
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:bframes=3"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}
VARIABLE = np.cumsum(np.random.default_rng(0).integers(20, 150, size=40)).tolist()
SHUFFLED = [33, 0, 12, 13, 39, 11, 25, 12]


def some_video(folder: Path, kind: str) -> VideoFacts:
    """Write a small video of a kind that a reader may get wrong."""
    match kind:
        case "h264":
            path = write_numbered(folder / "x.mp4")
        case "variable rate":
            path = write_numbered(folder / "x.mp4", times_ms=VARIABLE)
        case "first frame late":
            path = write_numbered(folder / "x.mkv", times_ms=range(500, 2500, 50))
        case "open groups":
            path = write_numbered(folder / "x.mp4", codec_options=OPEN_GOP)
        case "fragments":
            flags = {"movflags": "+frag_keyframe+empty_moov"}
            path = write_numbered(folder / "x.mp4", container_options=flags)
        case "vp9":
            path = write_numbered(folder / "x.webm", codec="libvpx-vp9")
        case "mpeg4":
            path = write_numbered(folder / "x.mp4", codec="mpeg4")
        case "hevc":
            path = write_numbered(folder / "x.mp4", codec="libx265", codec_options=X265)
        case "raw hevc":
            path = write_numbered(
                folder / "x.hevc", codec="libx265", container="hevc", codec_options=X265
            )
        case "transport stream":
            path = write_numbered(folder / "x.ts", container="mpegts", codec_options=OPEN_GOP)
        case "intra refresh":
            path = write_numbered(folder / "x.ts", container="mpegts", codec_options=REFRESH)
        case "avi":
            path = write_numbered(folder / "x.avi", container="avi")
        case _:
            raise AssertionError(kind)
    return read_facts(path)


TRUSTED = ["h264", "variable rate", "first frame late", "fragments", "vp9", "mpeg4"]
OTHERS = ["open groups", "hevc", "raw hevc", "transport stream", "avi"]


@pytest.mark.parametrize("kind", TRUSTED + OTHERS)
def test_stream_and_clips_give_the_frames_asked_for(tmp_path: Path, kind: str) -> None:
    facts = some_video(tmp_path, kind)
    assert read_numbers(list(stream_frames(facts))) == list(range(40))
    assert read_numbers(list(stream_frames(facts, indices=[3, 14, 38]))) == [3, 14, 38]
    assert read_numbers(read_frames(facts, SHUFFLED)) == SHUFFLED


@needs_decord
@pytest.mark.parametrize("kind", TRUSTED)
def test_decord_seeks_to_the_frames_that_pyav_streams(tmp_path: Path, kind: str) -> None:
    facts = some_video(tmp_path, kind)
    assert facts.reader == "decord"
    geometry = fit(facts.height, facts.width, None)
    for index in range(40):
        frame = _read_decord(facts, np.array([index]), geometry)
        assert frame is not None
        assert read_number(frame[0]) == index


@pytest.mark.parametrize("kind", ["open groups", "hevc", "transport stream", "intra refresh"])
def test_every_frame_can_be_sought_alone(tmp_path: Path, kind: str) -> None:
    facts = some_video(tmp_path, kind)
    geometry = fit(facts.height, facts.width, None)
    read = [_read_pyav(facts, np.array([index]), geometry)[0] for index in range(40)]
    assert read_numbers(read) == list(range(40))


def test_sparse_frames_of_a_longer_video_jump_between_keyframes(tmp_path: Path) -> None:
    facts = read_facts(write_numbered(tmp_path / "x.ts", container="mpegts", count=240))
    numbers = [1, 2, 100, 130, 239]
    assert read_numbers(read_frames(facts, numbers)) == numbers


def test_edit_list_starts_at_the_first_frame_shown(tmp_path: Path) -> None:
    path = write_numbered(
        tmp_path / "x.mp4",
        times_ms=[50 * number - 200 for number in range(40)],
        container_options={"avoid_negative_ts": "disabled"},
    )
    facts = read_facts(path)
    assert read_numbers(list(stream_frames(facts))) == list(range(4, 40))
    assert read_numbers(read_frames(facts, [20, 0])) == [24, 4]


def test_a_stream_joined_midway_starts_at_its_first_keyframe(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "x.ts", container="mpegts")
    path.write_bytes(path.read_bytes()[188 * 20 :])
    facts = read_facts(path)
    numbers = read_numbers(list(stream_frames(facts)))
    assert numbers[0] in (12, 24)
    assert numbers == list(range(numbers[0], 40))
    assert len(facts.timestamps) == len(numbers)


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Let an MP4 file move the pixel (x, y) to (a x + c y, b x + d y) for display."""

    def matrix(*corner: int) -> bytes:
        a, b, c, d = (number << 16 for number in corner)
        return struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)

    content = path.read_bytes()
    start = content.index(matrix(1, 0, 0, 1), content.index(b"tkhd"))
    path.write_bytes(content[:start] + matrix(a, b, c, d) + content[start + 36 :])


@pytest.mark.parametrize(
    ("corner", "shown"),
    [
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
        ((1, 0, 0, -1), lambda frame: frame[::-1]),
        ((-1, 0, 0, -1), lambda frame: frame[::-1, ::-1]),
        ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda frame: frame[::-1, ::-1].transpose(1, 0, 2)),
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
        ((0, -1, 1, 0), lambda frame: np.rot90(frame)),
    ],
)
def test_a_display_matrix_may_turn_and_mirror(
    tmp_path: Path, corner: tuple[int, int, int, int], shown: Callable[[Pixels], Pixels]
) -> None:
    path = write_numbered(tmp_path / "x.mp4")
    set_display_matrix(path, *corner)
    facts, expected = read_facts(path), shown(numbered(37)).astype(int)
    assert (facts.reader, facts.height, facts.width) == ("pyav", *expected.shape[:2])
    for frame in (read_frames(facts, [37])[0], list(stream_frames(facts))[37]):
        assert frame is not None
        assert np.abs(frame - expected).mean() < 4


def test_rotation_tag_is_applied(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "x.mp4")
    set_display_matrix(path, 0, 1, -1, 0)
    facts = read_facts(path)
    assert (facts.reader, facts.width, facts.height) == ("pyav", 48, 128)
    expected = np.rot90(numbered(37), -1)
    for frame in (read_frames(facts, [37])[0], list(stream_frames(facts))[37]):
        assert frame is not None
        assert np.abs(frame.astype(int) - expected).mean() < 4
    small = read_frames(facts, [37], FrameSize(height=64, width=24))[0]
    assert np.abs(small.astype(int) - expected[1::2, 1::2]).mean() < 8


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p"])
def test_odd_sizes_fit_any_frame(tmp_path: Path, pixel_format: str) -> None:
    odd = (46, 126) if pixel_format == "yuv420p" else (45, 127)
    height, width = odd
    facts = read_facts(
        write_numbered(tmp_path / "x.mp4", height=height, width=width, pixel_format=pixel_format)
    )
    assert (facts.height, facts.width) == odd
    for size in (FrameSize(height=33, width=51), FrameSize(height=90, width=17)):
        streamed = next(iter(stream_frames(facts, size)))
        assert streamed is not None
        assert (
            streamed.shape == read_frames(facts, [0], size)[0].shape == (size.height, size.width, 3)
        )


def test_crop_keeps_the_centre_and_the_aspect_ratio() -> None:
    wide = fit(100, 400, FrameSize(height=50, width=100))
    assert (wide.height, wide.width) == (50, 200)
    assert (wide.rows, wide.columns) == (slice(0, 50), slice(50, 150))
    tall = fit(300, 100, FrameSize(height=50, width=100))
    assert (tall.height, tall.width) == (300, 100)
    assert (tall.rows, tall.columns) == (slice(125, 175), slice(0, 100))
    same = fit(160, 320, FrameSize(height=128, width=256))
    assert (same.height, same.width) == (128, 256)
    assert (same.rows, same.columns) == (slice(0, 128), slice(0, 256))


@pytest.mark.parametrize("values", [{"height": 0, "width": 8}, {"height": 8, "width": -1}])
def test_frame_size_must_be_positive(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FrameSize(**values)


def test_description_tells_sizes_apart() -> None:
    small, large = FrameSize(height=64, width=128), FrameSize(height=128, width=128)
    assert transform_description(small) != transform_description(large)


@needs_decord
@pytest.mark.parametrize("size", [None, FrameSize(height=40, width=64)])
def test_readers_agree_to_half_a_grey_level(tmp_path: Path, size: FrameSize | None) -> None:
    y, x, t = np.meshgrid(np.arange(96), np.arange(160), np.arange(12), indexing="ij")
    grey = np.sin(x / 2 + t) + np.cos(y / 3 - t)
    waves = np.stack([grey, grey, grey + 0.2 * np.sin((x + y) / 30)], axis=-1) / 2
    frames = (127 + 90 * waves).astype(np.uint8).transpose(2, 0, 1, 3)
    write_video(tmp_path / "x.mp4", frames, fps=10)
    assert readers_difference(read_facts(tmp_path / "x.mp4"), np.arange(12), size) < 0.5


def readers_difference(
    facts: VideoFacts, indices: np.ndarray[tuple[int], np.dtype[np.int64]], size: FrameSize | None
) -> float:
    """Return the mean difference between the two readers in grey levels."""
    geometry = fit(facts.height, facts.width, size)
    by_decord = _read_decord(facts, indices, geometry)
    assert by_decord is not None
    return float(np.abs(by_decord.astype(int) - _read_pyav(facts, indices, geometry)).mean())


@needs_decord
@needs_shared
@pytest.mark.parametrize("name", ["track/drive_03.mp4", "highway/solidWhiteRight.mp4"])
def test_readers_agree_on_real_drives(name: str) -> None:
    facts = read_facts(SHARED / name)
    size = FrameSize(height=128, width=256)
    numbers = np.array([0, 7, 8, 100, 101, 219])
    assert readers_difference(facts, numbers, size) < 0.5
    # Neighbouring frames differ more than the readers do, so the readers return the same frames.
    for index in (8, 101):
        one, other = (readers_difference_between(facts, index, index + step) for step in (-1, 1))
        assert min(one, other) > 0.6


def readers_difference_between(facts: VideoFacts, index: int, other: int) -> float:
    """Return the mean difference between frame `index` of a clip and frame `other` of a stream."""
    size = FrameSize(height=128, width=256)
    clip = read_frames(facts, [index], size)[0].astype(int)
    return float(np.abs(clip - next(stream_frames(facts, size, [other]))).mean())


def test_file_that_shrank_after_its_facts_were_read_names_the_time_reached(tmp_path: Path) -> None:
    options = {"movflags": "+faststart"}
    facts = read_facts(write_numbered(tmp_path / "x.mp4", container_options=options))
    cut(facts.path, 0.75)
    frames = stream_frames(facts)
    seen: list[int] = []
    with pytest.raises(
        VideoError, match=r"x\.mp4: decoding stopped at \d\.\d s of 1\.9\d? s"
    ) as error:
        seen.extend(read_number(frame) for frame in frames if frame is not None)
    assert "\n" not in str(error.value)
    assert 0 < len(seen) < 40
    assert seen == list(range(len(seen)))
    with pytest.raises(VideoError, match=r"decoding stopped at 1\.9"):
        read_frames(facts, [0, 39])


def test_a_deleted_file_gives_a_one_line_error(tmp_path: Path) -> None:
    facts = read_facts(write_numbered(tmp_path / "x.mp4"))
    facts.path.unlink()
    with pytest.raises(VideoError, match=r"x\.mp4"):
        read_frames(facts, [3])
    with pytest.raises(VideoError, match=r"x\.mp4"):
        next(stream_frames(facts))


def test_indices_are_checked(tmp_path: Path) -> None:
    facts = read_facts(write_numbered(tmp_path / "x.mp4"))
    with pytest.raises(IndexError, match="only 40"):
        read_frames(facts, [40])
    with pytest.raises(IndexError, match="only 40"):
        read_frames(facts, [-1])
    with pytest.raises(ValueError, match="increasing"):
        next(stream_frames(facts, indices=[4, 3]))
    assert read_frames(facts, []) == []
    assert list(stream_frames(facts, indices=[])) == []


@needs_decord
def test_decord_gives_signs_of_life_between_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered(tmp_path / "x.mp4", count=250, keyframe_every=999, height=16)
    facts, beats = read_facts(path), []
    monkeypatch.setattr(video, "beat", lambda: beats.append(1))
    assert facts.reader == "decord"
    for numbers, least in (([30, 60, 90, 120, 150, 180, 210, 240], 4), (range(16), 2)):
        beats.clear()
        assert read_numbers(read_frames(facts, numbers)) == list(numbers)
        assert len(beats) == least


def test_a_clip_is_not_copied(tmp_path: Path) -> None:
    facts = read_facts(write_numbered(tmp_path / "x.mp4"))
    tracemalloc.start()
    frames = read_frames(facts, [*range(40), 3, 3], FrameSize(height=240, width=640))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = 40 * frames[0].nbytes
    assert size < peak < 1.5 * size


def test_few_threads_decode_large_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert [video._threads(pixels) for pixels in (0, 1080 * 1920, 2160 * 3840)] == [16] * 3
    assert [video._threads(pixels) for pixels in (4320 * 7680, 8192 * 8192, 1 << 40)] == [4, 1, 1]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert [video._threads(pixels) for pixels in (1080 * 1920, 8192 * 8192)] == [0, 1]
    facts, opened = read_facts(write_numbered(tmp_path / "x.mp4")), []

    def keep(*given: Any) -> VideoStream:
        opened.append(video_stream(*given))
        return opened[-1]

    monkeypatch.setattr(video, "video_stream", keep)
    monkeypatch.setattr(video, "_PIXELS_AT_ONCE", 2 * 48 * 128)
    assert read_numbers(list(stream_frames(facts))) == list(range(40))
    assert [stream.thread_count for stream in opened] == [2]


@needs_proc
def test_streaming_takes_constant_memory(tmp_path: Path) -> None:
    facts = read_facts(write_numbered(tmp_path / "x.mp4", count=250, height=256, width=384))
    resident = [resident_bytes() for _ in stream_frames(facts)]
    all_frames = 250 * 256 * 384 * 3
    assert max(resident[50:]) - resident[50] < all_frames / 4


@needs_proc
@needs_decord
def test_no_reader_stays_open_after_a_clip(tmp_path: Path) -> None:
    facts = read_facts(write_numbered(tmp_path / "x.mp4"))
    assert facts.reader == "decord"
    read_frames(facts, [3])
    before = threads_running()
    for _ in range(5):
        read_frames(facts, [3, 20])
    assert threads_running() <= before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def threads_running() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_facts_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    facts = pickle.loads(pickle.dumps(read_facts(write_numbered(tmp_path / "x.mp4"))))
    assert read_number(read_frames(facts, [21])[0]) == 21


def test_pyav_reads_clips_where_decord_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = replace(read_facts(write_numbered(tmp_path / "a.mp4")), reader="decord")
    monkeypatch.setitem(sys.modules, "decord", None)
    assert read_numbers(read_frames(facts, [7, 3])) == [7, 3]
