"""Frames out of video files: whole videos as a stream, clips by frame number.

Whole videos are streamed with PyAV. Clips are read with decord where `read_facts` allows it; a
reader is opened for the clip and closed after it, because an open decord reader decodes ahead
without bound.

All of it happens where it is called; the package calls it in `decoder` processes only.
"""

import os
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from driving_sim.data.video.file import VideoError, check_picture, open_video, video_stream
from driving_sim.data.video.file_facts import VideoFacts, read_facts
from driving_sim.data.video.frame_size import Fit, FrameSize, fit
from driving_sim.data.video.heartbeat import beat

__all__ = ["VideoFacts", "read_facts", "read_frames", "stream_frames"]

Frame = NDArray[np.uint8]
_DECORD_BATCH = 8
"""Frames between two signs of life; a batch for every frame takes a sixth longer."""
_DECORD_DISTANCE = 64
"""A batch ends where it decodes more frames than this on its way to those that are wanted."""
_MOST_THREADS = 16
_PIXELS_AT_ONCE = 4 * 4320 * 7680
"""Of the pictures that threads decode at once: four of 8K, where others are kept for reference."""
_SEEK_COST_FRAMES = 30
"""A seek costs about as much as decoding this many frames."""


def stream_frames(
    facts: VideoFacts,
    size: FrameSize | None = None,
    indices: NDArray[np.int64] | Sequence[int] | None = None,
) -> Iterator[Frame]:
    """Yield frames as uint8 RGB [height, width, 3], in order and in constant memory.

    `indices` are increasing frame numbers; without them every frame comes. Without a size frames
    keep the video's own.

    Raises VideoError where a wanted frame cannot be decoded, naming the time reached.
    """
    wanted = frames_to_stream(facts, indices)
    geometry = _geometry(facts, size)
    show = _Display(facts, geometry)
    for frame in _decode(facts, wanted, threads=0):
        yield show(frame)


def read_frames(
    facts: VideoFacts, indices: NDArray[np.int64] | Sequence[int], size: FrameSize | None = None
) -> NDArray[np.uint8]:
    """Read a clip: the frames at `indices`, in any order, as uint8 RGB [n, height, width, 3].

    For clips that fit in memory many times over. Raises VideoError where a frame cannot be decoded.
    """
    asked = frames_to_read(facts, indices)
    geometry = _geometry(facts, size)
    if len(asked) == 0:
        return _empty(0, geometry)
    wanted, positions = np.unique(asked, return_inverse=True)
    frames = _read_decord(facts, wanted, geometry) if facts.reader == "decord" else None
    if frames is None:
        frames = _read_pyav(facts, wanted, geometry)
    return in_order(frames, positions)


def in_order(frames: Frame, positions: NDArray[np.int64]) -> Frame:
    """The frames [n, ...] at these positions; no copy where they stand like that already."""
    return frames if np.array_equal(positions, np.arange(len(frames))) else frames[positions]


def frames_to_stream(
    facts: VideoFacts, indices: NDArray[np.int64] | Sequence[int] | None
) -> NDArray[np.int64]:
    """Frame numbers to stream, all of them by default.

    Raises IndexError where there is no such frame, ValueError where they do not increase.
    """
    wanted = frames_to_read(facts, range(len(facts.timestamps)) if indices is None else indices)
    if np.any(np.diff(wanted) <= 0):
        raise ValueError("indices: must be increasing")
    return wanted


def frames_to_read(
    facts: VideoFacts, indices: NDArray[np.int64] | Sequence[int] | range
) -> NDArray[np.int64]:
    """Frame numbers of a clip, in any order. Raises IndexError where there is no such frame."""
    wanted = np.asarray(indices, dtype=np.int64)
    count = len(facts.timestamps)
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= count):
        raise IndexError(f"{facts.path}: frames {wanted.min()}..{wanted.max()} of {count}")
    return wanted


def _geometry(facts: VideoFacts, size: FrameSize | None) -> Fit:
    geometry = fit(facts.height, facts.width, size)
    # A picture of one row, scaled until it covers the size, may take any amount of memory.
    check_picture(facts.path, geometry.height, geometry.width)
    return geometry


def _read_decord(facts: VideoFacts, wanted: NDArray[np.int64], geometry: Fit) -> Frame | None:
    """The clip as decord reads it; None where it does not agree with the facts."""
    try:
        import decord

        # What it says about damaged files goes to stderr; here the exception counts.
        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(
            str(facts.path), width=geometry.width, height=geometry.height, num_threads=1
        )
        if len(reader) != len(facts.timestamps):
            return None
        frames = _empty(len(wanted), geometry)
        for part in _decord_batches(facts, wanted):
            pictures = reader.get_batch(wanted[part]).asnumpy()
            frames[part] = pictures[:, geometry.rows, geometry.columns]
            beat()
    # Its error is a plain Exception, and it may not even load. PyAV then reads the clip, or says
    # what is wrong.
    except Exception:
        return None
    return frames


def _decord_batches(facts: VideoFacts, wanted: NDArray[np.int64]) -> Iterator[slice]:
    """Parts of the clip that do not take long: decord is silent until it has a whole one."""
    came_from = np.maximum(_keyframes_before(facts, wanted), np.append(-1, wanted[:-1]))
    stage = np.cumsum(wanted - came_from) // _DECORD_DISTANCE
    start = 0
    for stop in range(1, len(wanted) + 1):
        is_full = stop - start == _DECORD_BATCH or stop == len(wanted)
        if is_full or stage[stop] > stage[start]:
            yield slice(start, stop)
            start = stop


def _empty(count: int, geometry: Fit) -> Frame:
    return np.empty((count, geometry.size.height, geometry.size.width, 3), dtype=np.uint8)


def _read_pyav(facts: VideoFacts, wanted: NDArray[np.int64], geometry: Fit) -> Frame:
    frames = _empty(len(wanted), geometry)
    show = _Display(facts, geometry)
    # One thread: clips are read by many loader workers at a time.
    for slot, frame in enumerate(_decode(facts, wanted, threads=1)):
        frames[slot] = show(frame)
    return frames


def _decode(facts: VideoFacts, wanted: NDArray[np.int64], threads: int) -> Iterator[VideoFrame]:
    """Decode the frames with these increasing numbers: all of them, or a VideoError."""
    for run in _runs(facts, wanted):
        frames = _decode_run(facts, run, threads, keyframe=_keyframe_before(facts, run[0]))
        first = next(frames, None)
        if first is None:
            # The seek went past the frame; decoding from the start is slow but certain.
            frames = _decode_run(facts, run, threads, keyframe=0)
            first = next(frames, None)
        if first is None:
            raise _undecodable(facts, run[0], "it is missing")
        yield first
        yield from frames


def _runs(facts: VideoFacts, wanted: NDArray[np.int64]) -> list[list[int]]:
    """Split frame numbers where going to a later keyframe is cheaper than decoding on."""
    skipped = _keyframes_before(facts, wanted)[1:] - wanted[:-1]
    starts = np.flatnonzero(skipped > _SEEK_COST_FRAMES) + 1
    return [run.tolist() for run in np.split(wanted, starts) if len(run)]


def _keyframes_before(facts: VideoFacts, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    return facts.keyframes[np.searchsorted(facts.keyframes, wanted, side="right") - 1]


def _keyframe_before(facts: VideoFacts, index: int) -> int:
    return int(_keyframes_before(facts, np.array([index]))[0])


def _decode_run(
    facts: VideoFacts, wanted: list[int], threads: int, keyframe: int
) -> Iterator[VideoFrame]:
    """Decode from a keyframe on; yields nothing where even the first frame does not come."""
    position = 0
    try:
        for index, frame in _numbered(facts, keyframe, threads):
            if index > wanted[position]:
                break
            if index == wanted[position]:
                yield frame
                position += 1
            if position == len(wanted):
                return
    except av.error.MemoryError:
        raise  # no fault of the file's
    except av.error.FFmpegError as error:
        raise _undecodable(facts, wanted[position], error.strerror) from error
    if position > 0:
        raise _undecodable(facts, wanted[position], "it is missing")


def _numbered(facts: VideoFacts, keyframe: int, threads: int) -> Iterator[tuple[int, VideoFrame]]:
    """Decode from a keyframe on, each frame with its number."""
    with open_video(facts.path) as container:
        stream = video_stream(container, facts.path)
        stream.thread_type = "AUTO"
        pixels = stream.codec_context.height * stream.codec_context.width
        stream.thread_count = threads or _threads(pixels)
        if facts.pts is None:
            for index, frame in enumerate(container.decode(stream)):
                beat()
                yield index, frame
            return
        if keyframe > 0:
            container.seek(int(facts.pts[keyframe]), stream=stream)
        for frame in container.decode(stream):
            beat()
            index = int(np.searchsorted(facts.pts, frame.pts)) if frame.pts is not None else -1
            if 0 <= index < len(facts.pts) and facts.pts[index] == frame.pts:
                yield index, frame


def _threads(pixels: int) -> int:
    """How many threads decode pictures of this size, each at one of its own; 0 as FFmpeg likes."""
    most = max(1, min(_MOST_THREADS, _PIXELS_AT_ONCE // max(1, pixels)))
    return 0 if (os.cpu_count() or 1) < most else most


def _undecodable(facts: VideoFacts, index: int, why: str | None) -> VideoError:
    reached, total = facts.timestamps[index], facts.timestamps[-1]
    return VideoError(
        f"{facts.path}: decoding stopped at {reached:.1f} s of {total:.1f} s (frame {index}: "
        f"{why}): the file is truncated or damaged; copy it again, or cut it there"
    )


class _Display:
    """Decoded pictures to RGB frames: resized, turned upright, cropped."""

    def __init__(self, facts: VideoFacts, geometry: Fit) -> None:
        self._turns = facts.rotation // 90
        self._geometry = geometry
        self._height, self._width = geometry.height, geometry.width
        if self._turns % 2:
            self._height, self._width = self._width, self._height
        # Kept for all frames: setting up a scaler costs half as much as using it.
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> Frame:
        scaled = self._reformatter.reformat(
            frame,
            width=self._width,
            height=self._height,
            format="rgb24",
            interpolation="BILINEAR",
            # The default is a thread per core for every small picture: up to four times slower.
            threads=1,
        )
        upright = np.rot90(scaled.to_ndarray(), self._turns)
        return np.ascontiguousarray(upright[self._geometry.rows, self._geometry.columns])
