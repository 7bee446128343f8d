"""Frames out of video files: whole videos as a stream, clips by frame number.

Whole videos are streamed with PyAV. Clips are read with decord where `read_facts` allows it; a
reader is opened for the clip and closed after it, because an open decord reader decodes ahead
without bound.

All of it happens where it is called; the package calls it in `decoder` processes only.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from driving_sim.data.arrays import Ints, Pixels
from driving_sim.data.video.file import VideoError, check_picture, open_video, video_stream
from driving_sim.data.video.file_facts import VideoFacts
from driving_sim.data.video.frame_size import Fit, FrameSize, fit
from driving_sim.data.video.heartbeat import beat

Indices = Ints | Sequence[int]
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
    facts: VideoFacts, size: FrameSize | None = None, indices: Indices | None = None
) -> Iterator[Pixels]:
    """Yield frames as uint8 RGB [height, width, 3], in order and in constant memory.

    `indices` are increasing frame numbers; without them every frame comes. Without a size frames
    keep the video's own.

    Raises VideoError where a wanted frame cannot be decoded, naming the time reached.
    """
    wanted = frames_to_stream(facts, indices)
    return _displayed(facts, _geometry(facts, size), _decode(facts, wanted, threads=0))


def read_frames(facts: VideoFacts, indices: Indices, size: FrameSize | None = None) -> list[Pixels]:
    """Read a clip: the frames at `indices`, in any order, as uint8 RGB [height, width, 3] each.

    For clips that fit in memory many times over. Raises VideoError where a frame cannot be decoded.
    """
    wanted, positions = np.unique(frames_to_read(facts, indices), return_inverse=True)
    geometry = _geometry(facts, size)
    frames = _read_decord(facts, wanted, geometry) if facts.reader == "decord" else None
    if frames is None:
        frames = _read_pyav(facts, wanted, geometry)
    return [frames[position] for position in positions]


def frames_to_stream(facts: VideoFacts, indices: Indices | None) -> Ints:
    """Frame numbers to stream, all of them by default.

    Raises IndexError where there is no such frame, ValueError where they do not increase.
    """
    wanted = frames_to_read(facts, range(len(facts.timestamps)) if indices is None else indices)
    if np.any(np.diff(wanted) <= 0):
        raise ValueError("indices: must be increasing")
    return wanted


def frames_to_read(facts: VideoFacts, indices: Indices) -> Ints:
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


def _read_decord(facts: VideoFacts, wanted: Ints, geometry: Fit) -> Pixels | None:
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


def _decord_batches(facts: VideoFacts, wanted: Ints) -> Iterator[Ints]:
    """Parts of the clip that do not take long: decord is silent until it has a whole one."""
    came_from = np.maximum(_keyframes_before(facts, wanted), np.append(-1, wanted[:-1]))
    stage = np.cumsum(wanted - came_from) // _DECORD_DISTANCE
    for part in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(stage)) + 1):
        for start in range(0, len(part), _DECORD_BATCH):
            yield part[start : start + _DECORD_BATCH]


def _read_pyav(facts: VideoFacts, wanted: Ints, geometry: Fit) -> Pixels:
    frames = _empty(len(wanted), geometry)
    # One thread: clips are read by many loader workers at a time.
    pictures = _decode(facts, wanted, threads=1)
    for slot, frame in enumerate(_displayed(facts, geometry, pictures)):
        frames[slot] = frame
    return frames


def _empty(count: int, geometry: Fit) -> Pixels:
    # All at once and first: where memory is short Python says so, and a codec may crash.
    rows, columns = geometry.rows, geometry.columns
    return np.empty((count, rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)


def _decode(facts: VideoFacts, wanted: Ints, threads: int) -> Iterator[VideoFrame]:
    """Decode the frames with these increasing numbers: all of them, or a VideoError."""
    keyframes = _keyframes_before(facts, wanted)
    starts = np.flatnonzero(keyframes[1:] - wanted[:-1] > _SEEK_COST_FRAMES) + 1
    for run in np.split(wanted, starts) if len(wanted) else ():
        due = deque(run.tolist())
        # The seek may go past the first frame; decoding from the start is slow but certain.
        for keyframe in (int(_keyframes_before(facts, run)[0]), 0):
            if len(due) == len(run):
                yield from _decode_run(facts, due, threads, keyframe)
        if due:
            raise _undecodable(facts, due[0], "it is missing")


def _keyframes_before(facts: VideoFacts, wanted: Ints) -> Ints:
    return facts.keyframes[np.searchsorted(facts.keyframes, wanted, side="right") - 1]


def _decode_run(
    facts: VideoFacts, due: deque[int], threads: int, keyframe: int
) -> Iterator[VideoFrame]:
    """Decode from a keyframe on; what comes is due no more."""
    try:
        for index, frame in _numbered(facts, keyframe, threads):
            if index == due[0]:
                due.popleft()
                yield frame
            if not due or index > due[0]:
                return
    except av.error.MemoryError:
        raise  # no fault of the file's
    except av.error.FFmpegError as error:
        raise _undecodable(facts, due[0], error.strerror) from error


def _numbered(facts: VideoFacts, keyframe: int, threads: int) -> Iterator[tuple[int, VideoFrame]]:
    """Decode from a keyframe on, each frame with its number."""
    with open_video(facts.path) as container:
        stream = video_stream(container, facts.path)
        stream.thread_type = "AUTO"
        pixels = stream.codec_context.height * stream.codec_context.width
        stream.thread_count = threads or _threads(pixels)
        if facts.pts is not None and keyframe > 0:
            container.seek(int(facts.pts[keyframe]), stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            beat()
            if facts.pts is None:
                yield count, frame
            elif frame.pts is not None:
                index = int(np.searchsorted(facts.pts, frame.pts))
                if index < len(facts.pts) and facts.pts[index] == frame.pts:
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


def _displayed(
    facts: VideoFacts, geometry: Fit, pictures: Iterator[VideoFrame]
) -> Iterator[Pixels]:
    """Decoded pictures as RGB frames: resized, turned upright, cropped."""
    turns, height, width = facts.rotation // 90, geometry.height, geometry.width
    if turns % 2:
        height, width = width, height
    # Kept for all frames: setting up a scaler costs half as much as using it.
    reformatter = VideoReformatter()
    for picture in pictures:
        scaled = reformatter.reformat(
            picture,
            width=width,
            height=height,
            format="rgb24",
            interpolation="BILINEAR",
            # The default is a thread per core for every small picture: up to four times slower.
            threads=1,
        )
        upright = np.rot90(scaled.to_ndarray(), turns)
        yield np.ascontiguousarray(upright[geometry.rows, geometry.columns])
