"""Open video files that may be hostile, and refuse bad ones before anything is decoded.

FFmpeg also reads playlists, scripts and pictures, some of which refer to other files or to network
addresses. So only formats that contain their own video are allowed, and only local files.
"""

from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from driving_sim.data.arrays import Floats
from driving_sim.engine.errors import BadDriveError

MAX_PIXELS = 8192 * 8192
"""Largest picture in pixels, as it is stored, displayed or scaled: twice an 8K camera's picture."""
MAX_FRAMES = 10_000_000
"""Largest number of frames in a file: four days at 30 frames per second."""
MAX_DURATION_S = 7 * 24 * 3600.0
"""Longest time in seconds between the first and the last frame of a file."""
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,flv,asf,ogg,nut,mxf,gxf,"
    "dv,vc1,h263,mjpeg,yuv4mpegpipe,gif,apng,dhav,wtv,rm"
)


class VideoError(BadDriveError):
    """A video file cannot be read; the message says what is wrong, and where in the file."""


def check_file(path: Path) -> None:
    """Raise VideoError if the path is not a file or the file is empty."""
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if not path.is_file():
        raise VideoError(f"{path}: not a file; give a video file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty; copy it again or leave it out")


def open_video(path: Path) -> InputContainer:
    """Open a file that contains its own video; raises av.error.FFmpegError for all others."""
    options = {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": "file",
        "max_pixels": str(MAX_PIXELS),
    }
    # With the prefix "file:", a name such as "concat:a" stays a file name. Titles may be in any
    # encoding.
    return av.open(f"file:{path}", options=options, metadata_errors="replace")


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Return the first video stream of a file, ignoring the cover pictures of audio files.

    Raises VideoError if there is none, its codec is unknown or its picture too large.
    """
    for stream in container.streams.video:
        if stream.disposition & av.stream.Disposition.attached_pic:
            continue
        context = stream.codec_context
        if context is None:
            raise VideoError(f"{path}: its codec is not supported; convert it or leave it out")
        check_picture(path, context.height, context.width)
        # Limit the decoder too: the stream may contain larger pictures than the file's header says.
        context.options = {"max_pixels": str(MAX_PIXELS)}
        return stream
    raise VideoError(
        f"{path}: no video in this file (no frames, only sound, or cut off); leave it out"
    )


def check_picture(path: Path, height: int, width: int) -> None:
    """Raise VideoError if a picture of this size has too many pixels."""
    if height * width > MAX_PIXELS:
        raise VideoError(
            f"{path}: its pictures have {width:,}×{height:,} pixels, at most {MAX_PIXELS:,} are "
            "allowed; scale it down or leave it out"
        )


def check_count(path: Path, frames: int) -> int:
    """Return the most frames that a file of this size can hold, at one byte each.

    Raises VideoError if `frames` is more than that.
    """
    size = path.stat().st_size
    if frames > min(size, MAX_FRAMES):
        raise VideoError(
            f"{path}: claims {frames:,} frames in {size:,} bytes (at most one per byte and "
            f"{MAX_FRAMES:,} in total are allowed); copy it again or leave it out"
        )
    return min(size, MAX_FRAMES)


def check_times(path: Path, timestamps: Floats) -> None:
    """Raise VideoError if frame times [frames] do not increase or span more than seven days."""
    if not (np.diff(timestamps) > 0).all() or not timestamps[-1] <= MAX_DURATION_S:
        raise VideoError(
            f"{path}: the times of its frames do not increase, or span more than "
            f"{MAX_DURATION_S / 86400:.0f} days; leave it out, or repair it: "
            f"ffmpeg -i {path.name} -c copy whole.mkv"
        )
