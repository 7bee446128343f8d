"""Find out from a video file's packets what it contains and which reader decodes it correctly.

Whatever is left out, made up or guessed in doing so becomes a notice.

decord reads clips faster than PyAV. But it returns wrong frames, without an error, for most codecs
and for files with edit lists or with missing or negative timestamps. So decord only reads files for
which `_why_not_decord` finds no obstacle. PyAV reads all other files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.video.file import (
    MAX_PIXELS,
    VideoError,
    check_count,
    check_file,
    check_picture,
    check_times,
    open_video,
    passed_over,
    video_stream,
)
from driving_sim.data.video.frame_size import orientation
from driving_sim.data.video.heartbeat import beat
from driving_sim.data.video.segments import median_period
from driving_sim.data.video.timing import (
    Clock,
    about_left_out,
    about_rate,
    about_restarts,
    declared_end,
    even_times,
    is_about_missing_rate,
    nominal_rate,
    reordering,
    stores_rate,
)

_DECORD_CODECS = ("h264", "vp9", "mpeg4")
_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "mkv"}
# decord is used only for files with at most this many frames. It demuxes the whole file whenever it
# opens it, which takes about 5 µs per frame, whereas PyAV only seeks.
_DECORD_FRAMES = 5_000
# decord is used only for files with at most this many frames between keyframes. It gives no sign of
# life while it decodes from a keyframe to a requested frame. 300 frames of 4K take 10 s.
_DECORD_DISTANCE = 300
_PROGRESSIVE = 1  # FFmpeg's field orders: 0 is unknown, those above 1 are interlaced.


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoFacts:
    """Facts about one video file: its picture, the times of its frames, and the reader to use."""

    path: Path
    stream: int
    """Number of the video stream that is read, as ffprobe counts the streams of the file."""
    codec: str
    container: str
    width: int
    """Width in pixels of the displayed picture, after rotation and with square pixels."""
    height: int
    """Height in pixels of the displayed picture, after rotation and with square pixels."""
    rotation: int
    """Angle by which a decoded picture is rotated anticlockwise for display: 0, 90, 180 or 270."""
    mirrored: bool
    """Whether the picture is flipped left to right after it was rotated."""
    timestamps: Floats
    """[frames] Time of each frame in seconds from the first frame, strictly increasing."""
    has_own_times: bool
    """Whether `timestamps` come from the file, and not from an assumed frame rate."""
    restarts: Floats
    """Times in seconds of the first frames after each restart of the file's clock."""
    pts: Ints | None
    """[frames] Presentation timestamps in the stream's time base. None if the file has no usable
    timestamps, as in raw streams."""
    keyframes: Ints
    """Frame numbers at which decoding can begin, increasing from 0."""
    reordering: int
    """Largest number of frames that are decoded after a frame but displayed before it."""
    reader: Literal["decord", "pyav"]
    reason: str
    """Why this reader was chosen."""
    notices: tuple[str, ...]
    """What was left out, made up or guessed, one line each."""

    def timed(self, timestamps: Floats, notice: str | None = None) -> "VideoFacts":
        """Return the facts with frame times that another file contains, and a notice about it.

        Raises VideoError if the times do not increase or span more than seven days.
        """
        check_times(self.path, timestamps)
        kept = [line for line in self.notices if not is_about_missing_rate(line)]
        return replace(
            self,
            timestamps=timestamps,
            has_own_times=True,
            notices=(*kept, *([notice] if notice else [])),
        )


_PACKET = np.dtype(
    {
        "names": ["pts", "end", "timed", "keyframe", "corrupt", "discarded"],
        "formats": ["i8", "f8", "?", "?", "?", "?"],
    }
)
"""Facts about one packet. `pts` and `end` are the times at which its frame appears and disappears,
in the stream's time base. `timed` is whether the packet has these times, `corrupt` is whether it is
incomplete (the last packet of a truncated file), and `discarded` is whether its frame is never
displayed."""
Packets = NDArray[Any]


def decord_installed() -> bool:
    """Return whether decord is installed. It is optional, because it has no wheel for arm64."""
    return find_spec("decord") is not None


def read_facts(
    path: Path, *, stream: int | None = None, video_fps: float | None = None
) -> VideoFacts:
    """Read the packets of a video file, decode its first frame, and choose the reader.

    Takes milliseconds, because only the first frame is decoded. `stream` is the number of the video
    stream to read; None chooses the best. If a stream has no timestamps (raw .hevc, .h264), they
    are computed from its nominal frame rate, or from `video_fps` if it stores none.

    Raises VideoError if the file is missing, empty, truncated or not a video, if it has no frames
    or no such stream, or if it exceeds the limits in the module `file`.
    """
    check_file(path)
    pictures: set[int] = set()
    try:
        while True:
            with open_video(path) as container:
                chosen = video_stream(container, path, stream, pictures)
                clock = Clock(chosen)
                packets = np.fromiter(_demux(path, container, chosen, clock), _PACKET)
                rest = {other.index for other in container.streams.video} - {chosen.index}
                if len(packets) != 1 or stream is not None or rest <= pictures:
                    return _describe(path, chosen, packets, clock, video_fps)
                pictures.add(chosen.index)
    except av.error.MemoryError:
        raise  # Full memory is not the fault of the file.
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{path}: not a readable video ({error.strerror}): it is damaged, cut off, another "
            f"kind of file, or has pictures of more than {MAX_PIXELS:,} pixels; copy it again or "
            "leave it out"
        ) from error


def _demux(
    path: Path, container: InputContainer, stream: VideoStream, clock: Clock
) -> Iterator[tuple[int, float, bool, bool, bool, bool]]:
    most = check_count(path, stream.frames)
    for number, packet in enumerate(container.demux(stream)):
        beat()
        if number > most:
            check_count(path, number)
        if packet.size > 0:
            clock.set(packet)
            pts = packet.pts or 0
            yield (
                pts,
                float(pts + (packet.duration or 0)),
                packet.pts is not None,
                packet.is_keyframe,
                packet.is_corrupt,
                packet.is_discard,
            )


def _describe(
    path: Path, stream: VideoStream, packets: Packets, clock: Clock, video_fps: float | None
) -> VideoFacts:
    displayed = packets[~packets["discarded"]]
    if len(displayed) == 0:
        raise VideoError(f"{path}: no frames in this file; leave it out")
    first, is_damaged = _first_frame(path, stream.index)
    pts = _frame_pts(stream, displayed, first, is_damaged)
    is_stored = stores_rate(path, stream)
    if pts is not None and is_stored:
        timestamps = _seconds(pts - pts[0], stream)
    else:
        rate = nominal_rate(stream) if is_stored or video_fps is None else video_fps
        timestamps = even_times(len(displayed) if pts is None else len(pts), rate)
    check_times(path, timestamps)
    restarts = np.zeros(0) if pts is None else _seconds(np.array(clock.restarts) - pts[0], stream)
    _check_complete(path, stream, displayed, timestamps)
    sides: Any = first.side_data  # PyAV declares only one kind of side data.
    matrix = bytes(sides["DISPLAYMATRIX"]) if "DISPLAYMATRIX" in sides else None
    rotation, mirrored = orientation(first.rotation, matrix)
    aspect, height = stream.sample_aspect_ratio, first.height
    width = max(1, round(first.width * float(aspect))) if aspect else first.width
    if rotation in (90, 270):
        height, width = width, height
    check_picture(path, height, width)
    container = stream.container.format.name
    lines = [
        passed_over(stream),
        about_rate(stream, is_stored=is_stored, is_timed=pts is not None, video_fps=video_fps),
        about_restarts(restarts),
        *([] if pts is None else about_left_out(stream, displayed["pts"], pts)),
        _about_fields(stream, first),
    ]
    facts = VideoFacts(
        path=path,
        stream=stream.index,
        codec=stream.codec_context.codec.canonical_name,
        container=_CONTAINERS.get(container, container),
        width=width,
        height=height,
        rotation=rotation,
        mirrored=mirrored,
        timestamps=timestamps,
        has_own_times=is_stored,
        restarts=restarts,
        pts=pts,
        keyframes=_keyframes(pts, _intact(displayed)),
        reordering=0 if pts is None else reordering(displayed["pts"]),
        reader="pyav",
        reason="",
        notices=tuple(line for line in lines if line),
    )
    if obstacle := _why_not_decord(facts, stream, packets):
        return replace(facts, reason=obstacle)
    reason = f"{facts.codec} in {facts.container} with plain timestamps"
    return replace(facts, reader="decord", reason=reason)


def _intact(packets: Packets) -> Packets:
    intact: Packets = packets[packets["timed"] & ~packets["corrupt"]]
    return intact


def _first_frame(path: Path, number: int) -> tuple[VideoFrame, bool]:
    """Return the first frame that can be decoded, and whether there is damage before it."""
    is_damaged = False
    # Open the file again, because not every format allows seeking back to the start.
    with open_video(path) as container:
        stream = video_stream(container, path, number)
        stream.thread_count = 1  # By default some decoders start a thread per core.
        for packet in container.demux(stream):
            beat()
            try:
                for frame in packet.decode():
                    return frame, is_damaged
            except av.error.InvalidDataError:
                is_damaged = True
    raise VideoError(f"{path}: no frame of this file can be decoded; copy it again or leave it out")


def _about_fields(stream: VideoStream, first: VideoFrame) -> str | None:
    if not first.interlaced_frame and stream.codec_context.field_order <= _PROGRESSIVE:
        return None
    return (
        "its pictures are interlaced: every second line is from another moment, which shows as "
        "combs where something moves; they are not de-interlaced"
    )


def _frame_pts(
    stream: VideoStream, displayed: Packets, first: VideoFrame, is_damaged: bool
) -> Ints | None:
    # AVI stores no display times. The demuxer invents them, and they are wrong if the file stores
    # frames in another order than they are displayed (B-frames).
    has_invented_times = stream.container.format.name == "avi" and stream.codec_context.has_b_frames
    if not displayed["timed"].all() or first.pts is None or has_invented_times:
        return None
    pts = np.unique(displayed["pts"])
    # Leave out the frames before the first decodable frame: they depend on missing frames, so they
    # are never displayed. But the clock of the actions may begin with damaged frames.
    return pts if is_damaged else pts[pts >= first.pts]


def _seconds(ticks: Ints, stream: VideoStream) -> Floats:
    return np.asarray(ticks * float(stream.time_base or 0), dtype=np.float64)


def _keyframes(pts: Ints | None, intact: Packets) -> Ints:
    if pts is None:
        return np.zeros(1, dtype=np.int64)
    keyframe_pts = np.intersect1d(intact["pts"][intact["keyframe"]], pts)
    return np.union1d(0, np.searchsorted(pts, keyframe_pts)).astype(np.int64)


def _check_complete(
    path: Path, stream: VideoStream, displayed: Packets, timestamps: Floats
) -> None:
    expected = declared_end(stream)
    if expected is None or not displayed["timed"].all() or not stream.time_base:
        return
    end = float(_intact(displayed)["end"].max(initial=0)) * float(stream.time_base)
    # Tolerate a small difference, because some files do not contain the last frame's duration.
    if expected - end > max(0.5, 3 * median_period(timestamps)):
        fault = f"its frames end at {end:.1f} s of {expected:.1f} s"
    elif displayed["corrupt"][-1]:
        fault = f"its last frame, at {end:.1f} s, is incomplete"
    else:
        return
    raise VideoError(
        f"{path}: truncated: {fault}; copy it again, or keep the readable part: "
        f"ffmpeg -i {path.name} -c copy whole.mkv"
    )


def _why_not_decord(facts: VideoFacts, stream: VideoStream, packets: Packets) -> str:
    """Return why decord must not read this file, or an empty string if it may."""
    displayed, pts = packets[~packets["discarded"]], facts.pts
    distance = int(np.diff(np.append(facts.keyframes, len(displayed))).max())
    obstacles = {
        "decord is not installed": not decord_installed(),
        f"container {facts.container}": facts.container not in ("mp4", "mkv"),
        f"codec {facts.codec}": facts.codec not in _DECORD_CODECS,
        "packets without timestamps": pts is None,
        "discarded packets (edit list)": len(displayed) < len(packets),
        "open groups of pictures": _has_open_groups(_intact(displayed)),
        "negative first timestamp": pts is not None and int(pts[0]) < 0,
        "duplicate timestamps or undecodable leading frames": pts is not None
        and len(pts) != len(displayed),
        "frame count differs from the header's": stream.frames not in (0, len(displayed)),
        f"rotated by {facts.rotation} degrees": facts.rotation != 0,
        "mirrored": facts.mirrored,
        "several video streams": len(stream.container.streams.video) > 1,
        "a clock that starts again": len(facts.restarts) > 0,
        f"more than {_DECORD_FRAMES:,} frames": len(displayed) > _DECORD_FRAMES,
        f"more than {_DECORD_DISTANCE} frames between keyframes": distance > _DECORD_DISTANCE,
    }
    return next((reason for reason, applies in obstacles.items() if applies), "")


def _has_open_groups(intact: Packets) -> bool:
    """Return whether a frame is stored after a keyframe but displayed before that keyframe."""
    pts, number = intact["pts"], np.cumsum(intact["keyframe"])
    keyframe_pts = np.append(np.iinfo(np.int64).min, pts[intact["keyframe"]])
    return bool((pts < keyframe_pts[number]).any())
