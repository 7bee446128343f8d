"""Read frames from video files: whole videos as a stream, clips by frame number.

PyAV streams whole videos. decord reads clips if `read_facts` has chosen it for the file. A decord
reader is opened for each clip and then closed, because an open reader decodes ahead without limit.

These functions decode in the calling process. The package calls them in decoder processes only.
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
"""Largest number of frames that decord reads at once. Reading them singly takes a sixth longer."""
_DECORD_DISTANCE = 64
"""While decord reads a clip, a new batch begins whenever it has decoded this many more frames,
whether they were requested or not."""
_MOST_THREADS = 16
_PIXELS_AT_ONCE = 4 * 4320 * 7680
"""Largest number of pixels that all threads together decode at once: four 8K pictures. More threads
would leave too little memory for the reference pictures."""
_SEEK_COST_FRAMES = 30
"""Number of frames whose decoding costs about as much as one seek."""


def stream_frames(
    facts: VideoFacts, size: FrameSize | None = None, indices: Indices | None = None
) -> Iterator[Pixels]:
    """Yield frames as uint8 RGB [height, width, 3], in order and in constant memory.

    `indices` are increasing frame numbers; if None, all frames are yielded. If `size` is None,
    frames have the size of the video.

    Raises VideoError, with the time of the frame, if a requested frame cannot be decoded.
    """
    numbers = frames_to_stream(facts, indices)
    return _displayed(facts, _geometry(facts, size), _decode(facts, numbers, threads=0))


def read_frames(facts: VideoFacts, indices: Indices, size: FrameSize | None = None) -> list[Pixels]:
    """Return the frames at `indices`, in any order. Each is uint8 RGB [height, width, 3].

    The memory must have room for several copies of all these frames.

    Raises VideoError if a frame cannot be decoded.
    """
    numbers, positions = np.unique(frames_to_read(facts, indices), return_inverse=True)
    geometry = _geometry(facts, size)
    frames = _read_decord(facts, numbers, geometry) if facts.reader == "decord" else None
    if frames is None:
        frames = _read_pyav(facts, numbers, geometry)
    return [frames[position] for position in positions]


def frames_to_stream(facts: VideoFacts, indices: Indices | None) -> Ints:
    """Return the frame numbers to stream: `indices`, or all frames if it is None.

    Raises IndexError if a frame does not exist, and ValueError if `indices` do not increase.
    """
    numbers = frames_to_read(facts, range(len(facts.timestamps)) if indices is None else indices)
    if np.any(np.diff(numbers) <= 0):
        raise ValueError("indices: must be increasing")
    return numbers


def frames_to_read(facts: VideoFacts, indices: Indices) -> Ints:
    """Return `indices` as an array. Raises IndexError if a frame does not exist."""
    numbers = np.asarray(indices, dtype=np.int64)
    count = len(facts.timestamps)
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= count):
        raise IndexError(
            f"{facts.path}: frames {numbers.min()} to {numbers.max()} were requested, but there "
            f"are only {count}"
        )
    return numbers


def _geometry(facts: VideoFacts, size: FrameSize | None) -> Fit:
    geometry = fit(facts.height, facts.width, size)
    # Check the size after scaling too: a picture that is one row high, scaled up to the height of
    # `size`, would become extremely wide.
    check_picture(facts.path, geometry.height, geometry.width)
    return geometry


def _read_decord(facts: VideoFacts, numbers: Ints, geometry: Fit) -> Pixels | None:
    """Read a clip with decord. Return None if decord fails or finds another number of frames."""
    try:
        import decord

        # Do not print messages about damaged files: the exception is enough.
        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(
            str(facts.path), width=geometry.width, height=geometry.height, num_threads=1
        )
        if len(reader) != len(facts.timestamps):
            return None
        frames = _empty(len(numbers), geometry)
        for part in _decord_batches(facts, numbers):
            pictures = reader.get_batch(numbers[part]).asnumpy()
            frames[part] = pictures[:, geometry.rows, geometry.columns]
            beat()
    # decord raises plain Exceptions, and importing it may fail. After any error, PyAV reads the
    # clip, or raises an error that says what is wrong.
    except Exception:
        return None
    return frames


def _decord_batches(facts: VideoFacts, numbers: Ints) -> Iterator[Ints]:
    """Split a clip into short batches, because decord gives no sign of life while it reads a batch.

    Yields for each batch the positions of its frames in `numbers`.
    """
    came_from = np.maximum(_keyframes_before(facts, numbers), np.append(-1, numbers[:-1]))
    stage = np.cumsum(numbers - came_from) // _DECORD_DISTANCE
    for part in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(stage)) + 1):
        for start in range(0, len(part), _DECORD_BATCH):
            yield part[start : start + _DECORD_BATCH]


def _read_pyav(facts: VideoFacts, numbers: Ints, geometry: Fit) -> Pixels:
    frames = _empty(len(numbers), geometry)
    # Use one thread, because many loader workers read clips at the same time.
    pictures = _decode(facts, numbers, threads=1)
    for slot, frame in enumerate(_displayed(facts, geometry, pictures)):
        frames[slot] = frame
    return frames


def _empty(count: int, geometry: Fit) -> Pixels:
    # Allocate all frames before decoding. If memory runs out here, Python raises an error. If it
    # runs out later, the codec may crash.
    rows, columns = geometry.rows, geometry.columns
    return np.empty((count, rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)


def _decode(facts: VideoFacts, numbers: Ints, threads: int) -> Iterator[VideoFrame]:
    """Decode the frames with these increasing numbers. Raises VideoError if a frame is missing."""
    keyframes = _keyframes_before(facts, numbers)
    starts = np.flatnonzero(keyframes[1:] - numbers[:-1] > _SEEK_COST_FRAMES) + 1
    for run in np.split(numbers, starts) if len(numbers) else ():
        due = deque(run.tolist())
        # If a seek lands after the first requested frame, no frame is yielded. In that case, decode
        # from the start of the file, which is slow but always works.
        for keyframe in (int(_keyframes_before(facts, run)[0]), 0):
            if len(due) == len(run):
                yield from _decode_run(facts, due, threads, keyframe)
        if due:
            raise _undecodable(facts, due[0], "it is missing")


def _keyframes_before(facts: VideoFacts, numbers: Ints) -> Ints:
    return facts.keyframes[np.searchsorted(facts.keyframes, numbers, side="right") - 1]


def _decode_run(
    facts: VideoFacts, due: deque[int], threads: int, keyframe: int
) -> Iterator[VideoFrame]:
    """Decode from a keyframe on. Yield the frames whose numbers are in `due`, and remove these
    numbers from `due`."""
    try:
        for index, frame in _numbered(facts, keyframe, threads):
            if index == due[0]:
                due.popleft()
                yield frame
            if not due or index > due[0]:
                return
    except av.error.MemoryError:
        raise  # Full memory is not the fault of the file.
    except av.error.FFmpegError as error:
        raise _undecodable(facts, due[0], error.strerror) from error


def _numbered(facts: VideoFacts, keyframe: int, threads: int) -> Iterator[tuple[int, VideoFrame]]:
    """Decode from a keyframe on. Yield the number of each frame, and the frame."""
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
    """Return how many threads decode pictures of this size, or 0 to let FFmpeg choose."""
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
    """Convert decoded pictures to RGB frames that are resized, rotated upright and cropped."""
    turns, height, width = facts.rotation // 90, geometry.height, geometry.width
    if turns % 2:
        height, width = width, height
    # Use one scaler for all frames: creating a scaler takes half as long as scaling a frame.
    reformatter = VideoReformatter()
    for picture in pictures:
        scaled = reformatter.reformat(
            picture,
            width=width,
            height=height,
            format="rgb24",
            interpolation="BILINEAR",
            # By default, even small pictures use one thread per core, which takes up to four times
            # as long.
            threads=1,
        )
        upright = np.rot90(scaled.to_ndarray(), turns)
        yield np.ascontiguousarray(upright[geometry.rows, geometry.columns])
