"""Read frames from video files: whole videos as a stream, clips by frame number.

PyAV streams whole videos. decord reads clips if `read_facts` has chosen it for the file. A decord
reader is opened for each clip and then closed, because an open reader decodes ahead without limit.

Damage costs the frames from the damaged one to the next keyframe, because each may depend on the
one before it. A decoder that met damage is not trusted any more: another one goes on from there.

These functions decode in the calling process. The package calls them in decoder processes only.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from driving_sim.data.arrays import Ints, Pixels
from driving_sim.data.video.file import VideoError, check_picture, open_video, video_stream
from driving_sim.data.video.file_facts import VideoFacts
from driving_sim.data.video.frame_size import Fit, FrameSize, fit
from driving_sim.data.video.heartbeat import beat
from driving_sim.data.video.timing import Clock

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
_FEW_FRAMES = 16
"""Up to this many frames are decoded by one thread, because it takes long to start many."""


def stream_frames(
    facts: VideoFacts, size: FrameSize | None = None, indices: Indices | None = None
) -> Iterator[Pixels | None]:
    """Yield frames as uint8 RGB [height, width, 3], in order and in constant memory.

    A frame that is lost to damage is None. `indices` are increasing frame numbers; if None, all
    frames are yielded. If `size` is None, frames have the size of the video.

    Raises VideoError, with the time of the frame, if the file ends before a requested frame, or if
    it is damaged and its frames have no times, so that nothing says which frames are lost.
    """
    numbers = frames_to_stream(facts, indices)
    pictures = _decode(facts, numbers, threads=1 if len(numbers) <= _FEW_FRAMES else 0)
    return _displayed(facts, _geometry(facts, size), pictures)


def read_frames(facts: VideoFacts, indices: Indices, size: FrameSize | None = None) -> list[Pixels]:
    """Return the frames at `indices`, in any order. Each is uint8 RGB [height, width, 3].

    The memory must have room for several copies of all these frames.

    Raises VideoError if a frame cannot be decoded. But decord does not notice all damage.
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
        if frame is None:
            raise _undecodable(facts, int(numbers[slot]), "it is damaged")
        frames[slot] = frame
    return frames


def _empty(count: int, geometry: Fit) -> Pixels:
    # Allocate all frames before decoding. If memory runs out here, Python raises an error. If it
    # runs out later, the codec may crash.
    rows, columns = geometry.rows, geometry.columns
    return np.empty((count, rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)


def _decode(facts: VideoFacts, numbers: Ints, threads: int) -> Iterator[VideoFrame | None]:
    """Decode the frames with these increasing numbers. A frame that is lost to damage is None.

    Raises VideoError if a frame is missing for another reason.
    """
    keyframes = _keyframes_before(facts, numbers)
    starts = np.flatnonzero(keyframes[1:] - numbers[:-1] > _SEEK_COST_FRAMES) + 1
    for run in np.split(numbers, starts) if len(numbers) else ():
        due = deque(run.tolist())
        start = _keyframe_before(facts, due[0])
        may_start_earlier = start > 0
        while due:
            # H.264 may refresh its pictures bit by bit from a keyframe on. They are not shown until
            # they are whole, so begin earlier. Other decoders show broken pictures.
            starts_late = facts.codec == "h264" and not may_start_earlier
            damaged = yield from _decode_run(facts, due, threads, start, starts_late)
            if damaged == start and may_start_earlier:
                start = _keyframe_before(facts, start - 1)
            elif damaged is not None:
                recovered = _keyframe_after(facts, damaged)
                while due and due[0] < recovered:
                    due.popleft()
                    yield None
                start = _keyframe_before(facts, due[0]) if due else 0
            may_start_earlier = False


def _keyframes_before(facts: VideoFacts, numbers: Ints) -> Ints:
    return facts.keyframes[np.searchsorted(facts.keyframes, numbers, side="right") - 1]


def _keyframe_before(facts: VideoFacts, number: int) -> int:
    return int(_keyframes_before(facts, np.array([number]))[0])


def _keyframe_after(facts: VideoFacts, number: int) -> int:
    """Return the first keyframe after a frame, or the number of all frames if there is none."""
    place = int(np.searchsorted(facts.keyframes, number, side="right"))
    return int(np.append(facts.keyframes, len(facts.timestamps))[place])


def _decode_run(
    facts: VideoFacts, due: deque[int], threads: int, keyframe: int, starts_late: bool
) -> Generator[VideoFrame | None, None, int | None]:
    """Decode from a keyframe on. Yield the frames whose numbers are in `due`, and remove these
    numbers from `due`.

    Stop at the first damaged frame and return its number, or None if `due` is empty. If
    `starts_late`, frames that are missing at the start are lost (None), but are no damage.
    """
    # Damage may show later than in a frame that depends on it. So hold frames back for a while.
    held: deque[VideoFrame] = deque()
    expected = keyframe
    try:
        for index, picture, is_damaged in _numbered(facts, keyframe, threads):
            if index < expected:
                continue  # It is displayed before the keyframe.
            if starts_late and picture is not None:
                while due and due[0] < index:
                    due.popleft()
                    yield None
                expected = index
            starts_late = False
            if not due:
                return None
            damaged = expected if index > expected else index if is_damaged else None
            is_due = len(held) < len(due) and index == due[len(held)]
            if damaged is None and picture is not None and is_due:
                held.append(picture)
            is_over = picture is None and damaged is None
            intact = index if damaged is None else damaged - 1
            while held and (is_over or due[0] + facts.reordering <= intact):
                due.popleft()
                yield held.popleft()
                if not due:
                    return None
            if damaged is not None:
                return damaged
            expected = index + 1
    except av.error.MemoryError:
        raise  # Full memory is not the fault of the file.
    except av.error.FFmpegError as error:
        raise _undecodable(facts, due[0], error.strerror) from error
    raise _undecodable(facts, due[0], "it is missing")


def _numbered(
    facts: VideoFacts, keyframe: int, threads: int
) -> Iterator[tuple[int, VideoFrame | None, bool]]:
    """Decode from a keyframe on. Yield each frame with its number and whether it is damaged.

    At the end, yield None with the number of the frame that would come next in the file.
    """
    count, last_pts = 0, None
    # Among the packets of a transport stream, the mark is two packets before the first one that
    # comes after a hole, because a packet ends where the next one begins.
    delay, doubt = (2 if facts.container == "mpegts" else 0), -1
    suspects: set[int | None] = set()
    for packet in _packets(facts, keyframe, threads):
        beat()
        if packet.pts is not None:
            last_pts = packet.pts if last_pts is None else max(last_pts, packet.pts)
        if packet.is_corrupt:
            doubt = delay
        if doubt == 0 and facts.pts is not None and not (delay and packet.is_keyframe):
            suspects.add(_index(facts.pts, packet.pts))
        doubt -= 1
        for picture in _decoded(facts, packet):
            beat()
            index: int | None = count
            if facts.pts is not None:
                index = _index(facts.pts, picture.pts)
            elif picture.is_corrupt:
                raise _undecodable(facts, min(count, len(facts.timestamps) - 1), "it is damaged")
            count += 1
            if index is not None:
                yield index, picture, picture.is_corrupt or index in suspects
    if facts.pts is not None and last_pts is not None:
        count = int(np.searchsorted(facts.pts, last_pts, side="right"))
    yield count, None, False


def _index(pts: Ints, of: int | None) -> int | None:
    index = len(pts) if of is None else int(np.searchsorted(pts, of))
    return index if index < len(pts) and pts[index] == of else None


def _decoded(facts: VideoFacts, packet: "Packet[VideoStream]") -> list[VideoFrame]:
    """Return the frames that a decoder has finished when it is given a packet."""
    try:
        return packet.decode()
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError:
        if facts.pts is None:
            raise  # Without times, nothing says which frame is missing.
        return []


def _packets(facts: VideoFacts, keyframe: int, threads: int) -> Iterator["Packet[VideoStream]"]:
    """Yield the packets of a video from the one of a keyframe on."""
    earlier = _keyframe_before(facts, max(0, keyframe - 1))
    # If a seek lands after the keyframe, seek to an earlier one. Reading from the start of the file
    # is slow but always works.
    for sought in dict.fromkeys((0,) if len(facts.restarts) else (keyframe, earlier, 0)):
        with open_video(facts.path) as container:
            stream = video_stream(container, facts.path, facts.stream)
            stream.thread_type = "AUTO"
            pixels = stream.codec_context.height * stream.codec_context.width
            stream.thread_count = threads or _threads(pixels)
            clock = Clock(stream)
            if facts.pts is not None and sought > 0:
                container.seek(int(facts.pts[sought]), stream=stream)
            has_begun = facts.pts is None or keyframe == 0
            for packet in container.demux(stream):
                if packet.size > 0:
                    clock.set(packet)
                if not has_begun and packet.pts is not None and facts.pts is not None:
                    has_begun = packet.pts == facts.pts[keyframe]
                    if packet.is_keyframe and packet.pts > facts.pts[keyframe]:
                        break
                if has_begun:
                    yield packet
            if has_begun:
                return


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
    facts: VideoFacts, geometry: Fit, pictures: Iterator[VideoFrame | None]
) -> Iterator[Pixels | None]:
    """Convert decoded pictures to RGB frames that are resized, turned upright and cropped.

    Lost frames stay None."""
    turns, height, width = facts.rotation // 90, geometry.height, geometry.width
    if turns % 2:
        height, width = width, height
    # Use one scaler for all frames: creating a scaler takes half as long as scaling a frame.
    reformatter = VideoReformatter()
    for picture in pictures:
        if picture is None:
            yield None
            continue
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
        if facts.mirrored:
            upright = upright[:, ::-1]
        yield np.ascontiguousarray(upright[geometry.rows, geometry.columns])
