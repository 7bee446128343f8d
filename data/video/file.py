"""Open video files that may be hostile, and refuse bad files before decoding begins.

FFmpeg also reads playlists, scripts and pictures, some of which refer to other files or to network
addresses. So only local files are allowed, and only formats that contain the video itself.
"""

from collections.abc import Collection
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from driving_sim.data.arrays import Floats
from driving_sim.engine.errors import BadDriveError

MAX_PIXELS = 8192 * 8192
"""Largest number of pixels in a picture, whether as stored, displayed or scaled. An 8K picture has
half as many."""
MAX_FRAMES = 10_000_000
"""Largest number of frames in a file, about four days at 30 frames per second."""
MAX_DURATION_S = 7 * 24 * 3600.0
"""Longest time in seconds between the first and the last frame of a file."""
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,flv,asf,ogg,nut,mxf,gxf,"
    "dv,vc1,h263,mjpeg,yuv4mpegpipe,gif,apng,dhav,wtv,rm"
)
_PICTURE = av.stream.Disposition.attached_pic | av.stream.Disposition.still_image
_MOST_NAMED = 4


class VideoError(BadDriveError):
    """Error for a video file that cannot be read. It says what is wrong and where in the file."""


def check_file(path: Path) -> None:
    """Raise VideoError if the path is not a file or the file is empty."""
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if not path.is_file():
        raise VideoError(f"{path}: not a file; give a video file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty; copy it again or leave it out")


def open_video(path: Path, **demuxer_options: str) -> InputContainer:
    """Open a video file. Files that only refer to other files, such as playlists, are refused.

    Raises av.error.FFmpegError if the file is refused or cannot be opened.
    """
    options = demuxer_options | {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": "file",
        "max_pixels": str(MAX_PIXELS),
    }
    # Without the prefix "file:", FFmpeg would take a file name such as "concat:a" for a protocol.
    # Replace undecodable characters in metadata, because titles are not always UTF-8.
    return av.open(f"file:{path}", options=options, metadata_errors="replace")


def video_stream(
    container: InputContainer, path: Path, number: int | None = None, without: Collection[int] = ()
) -> VideoStream:
    """Return video stream `number` of a file, as ffprobe counts all streams, or the best one.

    The best stream is the one that FFmpeg prefers, but never a single picture, such as the cover of
    a song, and none of `without`.

    Raises VideoError if there is no such stream, if its codec is unknown, or if its pictures are
    too large.
    """
    stream = _best(container, without) if number is None else _numbered(container, path, number)
    if stream is None:
        raise VideoError(
            f"{path}: no video in this file (no frames, only sound, or cut off); leave it out"
        )
    context = stream.codec_context
    if context is None:
        raise VideoError(f"{path}: its codec is not supported; convert it or leave it out")
    check_picture(path, context.height, context.width)
    # Limit the decoder too: the stream may contain larger pictures than the file's header says.
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _best(container: InputContainer, without: Collection[int]) -> VideoStream | None:
    videos = [
        stream
        for stream in container.streams.video
        if not stream.disposition & _PICTURE and stream.index not in without
    ]
    best = container.streams.best("video")
    if best is not None and best.index in [stream.index for stream in videos]:
        return next(stream for stream in videos if stream.index == best.index)
    return max(videos, key=_pixels, default=None)


def _pixels(stream: VideoStream) -> int:
    context = stream.codec_context
    return context.height * context.width if context is not None else 0


def _numbered(container: InputContainer, path: Path, number: int) -> VideoStream:
    videos = container.streams.video
    for stream in videos:
        if stream.index == number:
            return stream
    known = _listed([_described(stream) for stream in videos]) or "none"
    raise VideoError(
        f"{path}: has no video stream {number}; its video streams are: {known} (choose with "
        "`stream`)"
    )


def passed_over(stream: VideoStream) -> str | None:
    """Return a notice that names the video streams that are not read, or None if there are none."""
    videos = stream.container.streams.video
    others = [_described(other) for other in videos if other.index != stream.index]
    if not others:
        return None
    return (
        f"of its {1 + len(others)} video streams, {_described(stream)} is read; left out: "
        f"{_listed(others)} (choose with `stream`)"
    )


def _described(stream: VideoStream) -> str:
    context = stream.codec_context
    what = f"{context.name} {context.width}×{context.height}" if context else "unknown codec"
    is_picture = stream.disposition & _PICTURE or stream.frames == 1
    return f"stream {stream.index} ({what}{', a single picture' if is_picture else ''})"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def check_picture(path: Path, height: int, width: int) -> None:
    """Raise VideoError if a picture of this size has too many pixels."""
    if height * width > MAX_PIXELS:
        raise VideoError(
            f"{path}: its pictures have {width:,}×{height:,} pixels, but at most {MAX_PIXELS:,} "
            "are allowed; scale them down or leave the file out"
        )


def check_count(path: Path, frames: int) -> int:
    """Raise VideoError if a file cannot contain this many frames; return how many it can contain.

    Each frame takes at least 1 byte, and no file may contain more than `MAX_FRAMES` frames.
    """
    size = path.stat().st_size
    if frames > min(size, MAX_FRAMES):
        raise VideoError(
            f"{path}: claims {frames:,} frames in {size:,} bytes (allowed are at most one frame "
            f"per byte, and {MAX_FRAMES:,} frames in total); copy it again or leave it out"
        )
    return min(size, MAX_FRAMES)


def check_times(path: Path, timestamps: Floats) -> None:
    """Raise VideoError if the times of frames do not increase or span more than seven days."""
    if not (np.diff(timestamps) > 0).all() or not timestamps[-1] <= MAX_DURATION_S:
        raise VideoError(
            f"{path}: the times of its frames do not increase, or span more than "
            f"{MAX_DURATION_S / 86400:.0f} days; leave it out, or repair it: "
            f"ffmpeg -i {path.name} -c copy whole.mkv"
        )
