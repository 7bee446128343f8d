"""What is in a video file and which reader may be trusted with it, from its packets alone.

decord is the faster reader of clips, but it returns wrong frames, without an error, for files with
edit lists, missing or negative timestamps and for most codecs. So it only gets the files listed in
`_why_not_decord`; PyAV reads all others.
"""

import re
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
    video_stream,
)
from driving_sim.data.video.heartbeat import beat
from driving_sim.data.video.segments import median_period

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
    timestamps: Floats
    """Seconds from the first frame, [frames], strictly increasing."""
    pts: Ints | None
    """The same in the stream's time base; None where the file has no timestamps (raw streams)."""
    keyframes: Ints
    """Frame numbers at which decoding can begin, increasing; the first is 0."""
    reader: Literal["decord", "pyav"]
    reason: str
    """Why this reader."""


_PACKET = np.dtype(
    {
        "names": ["pts", "end", "timed", "keyframe", "corrupt", "discarded"],
        "formats": ["i8", "f8", "?", "?", "?", "?"],
    }
)
"""Of a packet: when its frame is shown and when that ends, in the stream's time base; whether it
says so; and whether it is a keyframe, incomplete (the last of a file cut off), or never shown."""
Packets = NDArray[Any]


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
            packets = np.fromiter(_demux(path, container, stream), _PACKET)
            return _describe(path, stream, packets)
    except av.error.MemoryError:
        raise  # no fault of the file's
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{path}: not a readable video ({error.strerror}): it is damaged, cut off, another "
            f"kind of file, or has pictures of more than {MAX_PIXELS:,} pixels; copy it again or "
            "leave it out"
        ) from error


def _demux(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[tuple[int, float, bool, bool, bool, bool]]:
    most = check_count(path, stream.frames)
    for number, packet in enumerate(container.demux(stream)):
        beat()
        if number > most:
            check_count(path, number)
        if packet.size > 0:
            pts = packet.pts or 0
            yield (
                pts,
                float(pts + (packet.duration or 0)),
                packet.pts is not None,
                packet.is_keyframe,
                packet.is_corrupt,
                packet.is_discard,
            )


def _describe(path: Path, stream: VideoStream, packets: Packets) -> VideoFacts:
    shown = packets[~packets["discarded"]]
    if len(shown) == 0:
        raise VideoError(f"{path}: no frames in this file; leave it out")
    first = _first_frame(path)
    pts = _frame_pts(stream, shown, first)
    timestamps = _timestamps(pts, len(shown), stream)
    check_times(path, timestamps)
    _check_whole(path, stream, shown, timestamps)
    rotation = round(first.rotation / 90) % 4 * 90
    aspect, height = stream.sample_aspect_ratio, first.height
    width = max(1, round(first.width * float(aspect))) if aspect else first.width
    if rotation in (90, 270):
        height, width = width, height
    check_picture(path, height, width)
    container = stream.container.format.name
    facts = VideoFacts(
        path=path,
        codec=stream.codec_context.codec.canonical_name,
        container=_CONTAINERS.get(container, container),
        width=width,
        height=height,
        rotation=rotation,
        timestamps=timestamps,
        pts=pts,
        keyframes=_keyframes(pts, _sound(shown)),
        reader="pyav",
        reason="",
    )
    if obstacle := _why_not_decord(facts, stream, packets):
        return replace(facts, reason=obstacle)
    reason = f"{facts.codec} in {facts.container} with plain timestamps"
    return replace(facts, reader="decord", reason=reason)


def _sound(packets: Packets) -> Packets:
    sound: Packets = packets[packets["timed"] & ~packets["corrupt"]]
    return sound


def _first_frame(path: Path) -> VideoFrame:
    # Opened anew: not every format can be sought back to its start.
    with open_video(path) as container:
        stream = video_stream(container, path)
        stream.thread_count = 1  # some decoders start a thread per core for it
        for frame in container.decode(stream):
            return frame
    raise VideoError(f"{path}: no frame of this file can be decoded; copy it again or leave it out")


def _frame_pts(stream: VideoStream, shown: Packets, first: VideoFrame) -> Ints | None:
    # AVI has no display times; with reordered frames those that the demuxer makes up are wrong.
    made_up = stream.container.format.name == "avi" and stream.codec_context.has_b_frames
    if not shown["timed"].all() or first.pts is None or made_up:
        return None
    # Pictures that need a reference from before the file's start are never shown.
    pts = np.unique(shown["pts"])
    return pts[pts >= first.pts]


def _keyframes(pts: Ints | None, sound: Packets) -> Ints:
    if pts is None:
        return np.zeros(1, dtype=np.int64)
    keyframe_pts = np.intersect1d(sound["pts"][sound["keyframe"]], pts)
    return np.union1d(0, np.searchsorted(pts, keyframe_pts)).astype(np.int64)


def _timestamps(pts: Ints | None, count: int, stream: VideoStream) -> Floats:
    if pts is not None and stream.time_base:
        return np.asarray((pts - pts[0]) * float(stream.time_base), dtype=np.float64)
    rate = stream.guessed_rate or stream.average_rate
    return np.arange(count, dtype=np.float64) / float(rate or _FALLBACK_RATE)


def _check_whole(path: Path, stream: VideoStream, shown: Packets, timestamps: Floats) -> None:
    expected = _declared_end(stream)
    if expected is None or not shown["timed"].all() or not stream.time_base:
        return
    end = float(_sound(shown)["end"].max(initial=0)) * float(stream.time_base)
    # A slack for the last frame's length, which some writers leave out.
    if expected - end > max(0.5, 3 * median_period(timestamps)):
        fault = f"its frames end at {end:.1f} s of {expected:.1f} s"
    elif shown["corrupt"].any():
        fault = f"its last frame, at {end:.1f} s, is incomplete"
    else:
        return
    raise VideoError(
        f"{path}: truncated: {fault}; copy it again, or keep what is there: "
        f"ffmpeg -i {path.name} -c copy whole.mkv"
    )


def _declared_end(stream: VideoStream) -> float | None:
    """When the stream should end, in seconds of its own clock; None where the file does not say."""
    is_mov = stream.container.format.name.startswith("mov")
    if is_mov and stream.duration and stream.time_base:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    clock = _MATROSKA_DURATION.fullmatch(stream.metadata.get("DURATION", ""))
    if clock:
        hours, minutes, seconds = (float(part) for part in clock.groups())
        return 3600 * hours + 60 * minutes + seconds
    return None


def _why_not_decord(facts: VideoFacts, stream: VideoStream, packets: Packets) -> str:
    """The first reason against decord, or nothing."""
    shown, pts = packets[~packets["discarded"]], facts.pts
    distance = int(np.diff(np.append(facts.keyframes, len(shown))).max())
    obstacles = {
        "decord is not installed": not decord_installed(),
        f"container {facts.container}": facts.container not in ("mp4", "mkv"),
        f"codec {facts.codec}": facts.codec not in _DECORD_CODECS,
        "packets without timestamps": pts is None,
        "discarded packets (edit list)": len(shown) < len(packets),
        "open groups of pictures": _has_open_groups(_sound(shown)),
        "negative first timestamp": pts is not None and int(pts[0]) < 0,
        "duplicate timestamps or undecodable leading frames": pts is not None
        and len(pts) != len(shown),
        "frame count differs from the header's": stream.frames not in (0, len(shown)),
        f"rotated by {facts.rotation} degrees": facts.rotation != 0,
        f"more than {_DECORD_FRAMES:,} frames": len(shown) > _DECORD_FRAMES,
        f"more than {_DECORD_DISTANCE} frames between keyframes": distance > _DECORD_DISTANCE,
    }
    return next((reason for reason, applies in obstacles.items() if applies), "")


def _has_open_groups(sound: Packets) -> bool:
    """Whether a frame is shown before the keyframe that it is stored after."""
    pts, number = sound["pts"], np.cumsum(sound["keyframe"])
    keyframe_pts = np.append(np.iinfo(np.int64).min, pts[sound["keyframe"]])
    return bool((pts < keyframe_pts[number]).any())
