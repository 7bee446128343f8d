"""What is in a video file and which reader may be trusted with it, from its packets alone.

decord is the faster reader of clips, but it returns wrong frames, without an error, for files with
edit lists, missing or negative timestamps and for most codecs. So it only gets the files listed in
`_why_not_decord`; PyAV reads all others.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from driving_sim.data.video.file import (
    MAX_PIXELS,
    VideoError,
    check_count,
    check_file,
    check_picture,
    check_times,
    most_frames,
    open_video,
    video_stream,
)
from driving_sim.data.video.heartbeat import beat
from driving_sim.data.video.segments import median_period

__all__ = ["VideoError", "VideoFacts", "decord_installed", "read_facts"]

_DECORD_CODECS = ("h264", "vp9", "mpeg4")
_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "mkv"}
# decord demuxes the whole file whenever it opens it, about 5 µs a frame; PyAV seeks instead.
_DECORD_FRAMES = 5_000
# decord gives no sign of life on its way to a frame, and this many of 4K take it ten seconds.
_DECORD_DISTANCE = 300
_FALLBACK_RATE = 25.0
_MATROSKA_DURATION = re.compile(r"(\d+):(\d+):(\d+\.?\d*)")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoFacts:
    """One video file: its picture, its frames' times, and the reader that gets it right."""

    path: Path
    codec: str
    container: str
    width: int
    """Pixels as displayed: rotation and pixel aspect ratio applied."""
    height: int
    """Pixels as displayed: rotation and pixel aspect ratio applied."""
    rotation: int
    """Degrees anticlockwise by which a decoded picture is turned for display: 0, 90, 180, 270."""
    timestamps: NDArray[np.float64]
    """Seconds from the first frame, [frames], strictly increasing."""
    pts: NDArray[np.int64] | None
    """The same in the stream's time base; None where the file has no timestamps (raw streams)."""
    keyframes: NDArray[np.int64]
    """Frame numbers at which decoding can begin, increasing; the first is 0."""
    reader: Literal["decord", "pyav"]
    reason: str
    """Why this reader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packets:
    count: int
    discarded: int
    corrupt: int
    pts: NDArray[np.int64] | None
    keyframe_pts: NDArray[np.int64]
    leading: int
    """Frames shown before the keyframe they are stored after (open groups of pictures)."""
    end: int
    """Where the last frame ends, in the stream's time base."""


@cache
def decord_installed() -> bool:
    """Whether decord is there: it has no wheel for arm64."""
    return find_spec("decord") is not None


def read_facts(path: Path) -> VideoFacts:
    """Read the file's packets, decode its first frame, and decide who reads it.

    Takes milliseconds: nothing is decoded after the first frame. A stream without timestamps
    (raw .hevc, .h264) gets them from its nominal rate.

    Raises VideoError for a file that is missing, empty, truncated, not a video or without frames,
    and for one beyond the limits of `file`.
    """
    check_file(path)
    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            check_count(path, stream.frames)
            packets = _demux(path, container, stream)
            return _describe(path, container, stream, packets)
    except av.error.MemoryError:
        raise  # no fault of the file's
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{path}: not a readable video ({error.strerror}): it is damaged, cut off, another "
            f"kind of file, or has pictures of more than {MAX_PIXELS:,} pixels; copy it again or "
            "leave it out"
        ) from error


def _demux(path: Path, container: InputContainer, stream: VideoStream) -> _Packets:
    pts: list[int | None] = []
    keyframe_pts: list[int] = []
    discarded = corrupt = leading = end = 0
    most = most_frames(path)
    for number, packet in enumerate(container.demux(stream)):
        beat()
        if number > most:
            check_count(path, number)
        if packet.size == 0:
            continue
        if packet.is_discard:
            discarded += 1
            continue
        pts.append(packet.pts)
        # The last packet of a file that was cut off.
        corrupt += packet.is_corrupt
        if packet.pts is not None and not packet.is_corrupt:
            end = max(end, packet.pts + (packet.duration or 0))
            if packet.is_keyframe:
                keyframe_pts.append(packet.pts)
            leading += bool(keyframe_pts) and packet.pts < keyframe_pts[-1]
    known = [value for value in pts if value is not None]
    return _Packets(
        count=len(pts),
        discarded=discarded,
        corrupt=corrupt,
        pts=np.array(known, dtype=np.int64) if len(known) == len(pts) else None,
        keyframe_pts=np.array(keyframe_pts, dtype=np.int64),
        leading=leading,
        end=end,
    )


def _describe(
    path: Path, container: InputContainer, stream: VideoStream, packets: _Packets
) -> VideoFacts:
    if packets.count == 0:
        raise VideoError(f"{path}: no frames in this file; leave it out")
    first = _first_frame(path)
    pts = _frame_pts(container, stream, packets, first)
    timestamps = _timestamps(pts, packets.count, stream)
    check_times(path, timestamps)
    _check_whole(path, container, stream, packets, timestamps)
    rotation = round(first.rotation / 90) % 4 * 90
    codec = stream.codec_context.codec.canonical_name
    container_name = _CONTAINERS.get(container.format.name, container.format.name)
    keyframes = _keyframes(pts, packets.keyframe_pts)
    obstacle = _why_not_decord(codec, container_name, rotation, stream, packets, pts, keyframes)
    width, height = _display_size(first, stream, rotation)
    check_picture(path, height, width)
    return VideoFacts(
        path=path,
        codec=codec,
        container=container_name,
        width=width,
        height=height,
        rotation=rotation,
        timestamps=timestamps,
        pts=pts,
        keyframes=keyframes,
        reader="pyav" if obstacle else "decord",
        reason=obstacle or f"{codec} in {container_name} with plain timestamps",
    )


def _first_frame(path: Path) -> VideoFrame:
    # Opened anew: not every format can be sought back to its start.
    with open_video(path) as container:
        stream = video_stream(container, path)
        stream.thread_count = 1  # some decoders start a thread per core for it
        for frame in container.decode(stream):
            return frame
    raise VideoError(f"{path}: no frame of this file can be decoded; copy it again or leave it out")


def _frame_pts(
    container: InputContainer, stream: VideoStream, packets: _Packets, first: VideoFrame
) -> NDArray[np.int64] | None:
    # AVI has no display times; with reordered frames those that the demuxer makes up are wrong.
    made_up = container.format.name == "avi" and stream.codec_context.has_b_frames
    if packets.pts is None or first.pts is None or made_up:
        return None
    # Pictures that need a reference from before the file's start are never shown.
    pts = np.unique(packets.pts)
    return pts[pts >= first.pts]


def _keyframes(pts: NDArray[np.int64] | None, keyframe_pts: NDArray[np.int64]) -> NDArray[np.int64]:
    if pts is None:
        return np.zeros(1, dtype=np.int64)
    shown = np.searchsorted(pts, keyframe_pts[np.isin(keyframe_pts, pts)])
    return np.union1d(0, shown).astype(np.int64)


def _timestamps(
    pts: NDArray[np.int64] | None, count: int, stream: VideoStream
) -> NDArray[np.float64]:
    if pts is not None and stream.time_base:
        return np.asarray((pts - pts[0]) * float(stream.time_base), dtype=np.float64)
    rate = stream.guessed_rate or stream.average_rate
    return np.arange(count, dtype=np.float64) / float(rate or _FALLBACK_RATE)


def _check_whole(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    packets: _Packets,
    timestamps: NDArray[np.float64],
) -> None:
    expected = _declared_end(container, stream)
    if expected is None or packets.pts is None or not stream.time_base:
        return
    end = packets.end * float(stream.time_base)
    # A slack for the last frame's length, which some writers leave out.
    if expected - end > max(0.5, 3 * median_period(timestamps)):
        fault = f"its frames end at {end:.1f} s of {expected:.1f} s"
    elif packets.corrupt:
        fault = f"its last frame, at {end:.1f} s, is incomplete"
    else:
        return
    raise VideoError(
        f"{path}: truncated: {fault}; copy it again, or keep what is there: "
        f"ffmpeg -i {path.name} -c copy whole.mkv"
    )


def _declared_end(container: InputContainer, stream: VideoStream) -> float | None:
    """When the stream should end, in seconds of its own clock; None where the file does not say."""
    if container.format.name.startswith("mov") and stream.duration and stream.time_base:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    clock = _MATROSKA_DURATION.fullmatch(stream.metadata.get("DURATION", ""))
    if clock:
        hours, minutes, seconds = (float(part) for part in clock.groups())
        return 3600 * hours + 60 * minutes + seconds
    return None


def _display_size(first: VideoFrame, stream: VideoStream, rotation: int) -> tuple[int, int]:
    aspect = stream.sample_aspect_ratio
    width = max(1, round(first.width * float(aspect))) if aspect else first.width
    return (first.height, width) if rotation in (90, 270) else (width, first.height)


def _why_not_decord(
    codec: str,
    container: str,
    rotation: int,
    stream: VideoStream,
    packets: _Packets,
    pts: NDArray[np.int64] | None,
    keyframes: NDArray[np.int64],
) -> str:
    """The first reason against decord, or nothing."""
    distance = int(np.diff(np.append(keyframes, packets.count)).max())
    obstacles = {
        "decord is not installed": not decord_installed(),
        f"container {container}": container not in ("mp4", "mkv"),
        f"codec {codec}": codec not in _DECORD_CODECS,
        "packets without timestamps": pts is None,
        "discarded packets (edit list)": packets.discarded > 0,
        "open groups of pictures": packets.leading > 0,
        "negative first timestamp": pts is not None and int(pts[0]) < 0,
        "duplicate timestamps or undecodable leading frames": pts is not None
        and len(pts) != packets.count,
        "frame count differs from the header's": stream.frames not in (0, packets.count),
        f"rotated by {rotation} degrees": rotation != 0,
        f"more than {_DECORD_FRAMES:,} frames": packets.count > _DECORD_FRAMES,
        f"more than {_DECORD_DISTANCE} frames between keyframes": distance > _DECORD_DISTANCE,
    }
    return next((reason for reason, applies in obstacles.items() if applies), "")
