"""Read frames from video files: whole videos as a stream, clips by frame number.

PyAV streams whole videos. decord reads clips if `read_facts` allows it. A decord reader is opened
for each clip and closed after it, because an open one decodes ahead without limit.

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
"""Largest number of frames in a batch of decord. Batches of one frame take a sixth longer."""
_DECORD_DISTANCE = 64
"""Number of frames, requested or not, that decord decodes for one batch at most."""
_MOST_THREADS = 16
_PIXELS_AT_ONCE = 4 * 4320 * 7680
"""Largest number of pixels that all threads decode at once: four 8K pictures. The memory of the
process must also hold reference pictures."""
_SEEK_COST_FRAMES = 30
"""Number of frames whose decoding costs about as much as one seek."""


def stream_frames(
    facts: VideoFacts, size: FrameSize | None = None, indices: Indices | None = None
) -> Iterator[Pixels]:
    """Yield frames as uint8 RGB [height, width, 3], in order and in constant memory.

    `indices` are increasing frame numbers; without them every frame is yielded. Without a `size`,
    frames keep the size of the video.

    Raises VideoError, naming the time reached, if a requested frame cannot be decoded.
    """
    numbers = frames_to_stream(facts, indices)
    return _displayed(facts, _geometry(facts, size), _decode(facts, numbers, threads=0))


def read_frames(facts: VideoFacts, indices: Indices, size: FrameSize | None = None) -> list[Pixels]:
    """Read the frames at `indices`, in any order, as uint8 RGB [height, width, 3] each.

    The clip should fit in memory several times. Raises VideoError if a frame cannot be decoded.
    """
    numbers, positions = np.unique(frames_to_read(facts, indices), return_inverse=True)
    geometry = _geometry(facts, size)
    frames = _read_decord(facts, numbers, geometry) if facts.reader == "decord" else None
    if frames is None:
        frames = _read_pyav(facts, numbers, geometry)
    return [frames[position] for position in positions]


def frames_to_stream(facts: VideoFacts, indices: Indices | None) -> Ints:
    """Return the frame numbers to stream: `indices`, or all frames if it is None.

    Raises IndexError if a frame does not exist, ValueError if the numbers do not increase.
    """
    numbers = frames_to_read(facts, range(len(facts.timestamps)) if indices is None else indices)
    if np.any(np.diff(numbers) <= 0):
        raise ValueError("indices: must be increasing")
    return numbers


def frames_to_read(facts: VideoFacts, indices: Indices) -> Ints:
    """Return `indices` as an array of frame numbers; raise IndexError if one does not exist."""
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
    # Scaling a picture of a single row up to the frame size could take any amount of memory.
    check_picture(facts.path, geometry.height, geometry.width)
    return geometry


def _read_decord(facts: VideoFacts, numbers: Ints, geometry: Fit) -> Pixels | None:
    """Read a clip with decord; return None if decord fails or does not agree with the facts."""
    try:
        import decord

        # Keep messages about damaged files off stderr: the exception is enough.
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
    # decord raises plain Exceptions, and may fail to load. PyAV then reads the clip, or raises an
    # error that says what is wrong.
    except Exception:
        return None
    return frames


def _decord_batches(facts: VideoFacts, numbers: Ints) -> Iterator[Ints]:
    """Split a clip into batches that are quick to read: within one, decord gives no sign of life.

    Yields the positions in `numbers` of each batch.
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
    # Allocate all frames before decoding. If memory runs out, Python reports it; a codec may crash.
    rows, columns = geometry.rows, geometry.columns
    return np.empty((count, rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)


def _decode(facts: VideoFacts, numbers: Ints, threads: int) -> Iterator[VideoFrame]:
    """Decode the frames with these increasing numbers; raise VideoError if one is missing."""
    keyframes = _keyframes_before(facts, numbers)
    starts = np.flatnonzero(keyframes[1:] - numbers[:-1] > _SEEK_COST_FRAMES) + 1
    for run in np.split(numbers, starts) if len(numbers) else ():
        due = deque(run.tolist())
        # If the seek went past the first frame, decode from the start, which is slow but certain.
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
    """Decode from a keyframe on; yield the frames whose numbers are in `due` and remove those."""
    try:
        for index, frame in _numbered(facts, keyframe, threads):
            if index == due[0]:
                due.popleft()
                yield frame
            if not due or index > due[0]:
                return
    except av.error.MemoryError:
        raise  # The file is not at fault.
    except av.error.FFmpegError as error:
        raise _undecodable(facts, due[0], error.strerror) from error


def _numbered(facts: VideoFacts, keyframe: int, threads: int) -> Iterator[tuple[int, VideoFrame]]:
    """Decode from a keyframe on; yield each frame with its number."""
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
    """Return how many threads may decode pictures of this size, or 0 to let FFmpeg choose."""
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
    """Yield decoded pictures as RGB frames: resized, rotated upright and cropped."""
    turns, height, width = facts.rotation // 90, geometry.height, geometry.width
    if turns % 2:
        height, width = width, height
    # Share one scaler among all frames: creating it costs half as much as using it.
    reformatter = VideoReformatter()
    for picture in pictures:
        scaled = reformatter.reformat(
            picture,
            width=width,
            height=height,
            format="rgb24",
            interpolation="BILINEAR",
            # The default, a thread per core even for a small picture, is up to four times slower.
            threads=1,
        )
        upright = np.rot90(scaled.to_ndarray(), turns)
        yield np.ascontiguousarray(upright[geometry.rows, geometry.columns])
