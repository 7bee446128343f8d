"""Opening a video file that may be hostile: what is refused before anything of it is decoded.

FFmpeg reads playlists, scripts and pictures too, and some of them name other files or addresses:
only formats that hold their own video are let in, and only from the file itself.
"""

from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from driving_sim.data.arrays import Floats
from driving_sim.engine.errors import BadDriveError

MAX_PIXELS = 8192 * 8192
"""Of a picture, as it is stored, shown or scaled. The cameras of cars have up to 8K, half of it."""
MAX_FRAMES = 10_000_000
"""Of a file: four days at 30 a second."""
MAX_DURATION_S = 7 * 24 * 3600.0
"""From a file's first frame to its last."""
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,flv,asf,ogg,nut,mxf,gxf,"
    "dv,vc1,h263,mjpeg,yuv4mpegpipe,gif,apng,dhav,wtv,rm"
)


class VideoError(BadDriveError):
    """A video file that cannot be read: what is wrong with it and where."""


def check_file(path: Path) -> None:
    """Raise VideoError for what is no file, or an empty one."""
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if not path.is_file():
        raise VideoError(f"{path}: not a file; give a video file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty; copy it again or leave it out")


def open_video(path: Path) -> InputContainer:
    """Open a file that holds its own video; raises av.error.FFmpegError for all others."""
    options = {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": "file",
        "max_pixels": str(MAX_PIXELS),
    }
    # The prefix: a name such as "concat:a" is a file's name here. A title may be in any encoding.
    return av.open(f"file:{path}", options=options, metadata_errors="replace")


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The file's first video stream; cover pictures of audio files do not count."""
    for stream in container.streams.video:
        if stream.disposition & av.stream.Disposition.attached_pic:
            continue
        context = stream.codec_context
        if context is None:
            raise VideoError(f"{path}: nothing here decodes its codec; convert it or leave it out")
        check_picture(path, context.height, context.width)
        # The decoder meets sizes of its own in the stream, whatever the file's header says.
        context.options = {"max_pixels": str(MAX_PIXELS)}
        return stream
    raise VideoError(
        f"{path}: no video in this file (no frames, only sound, or cut off); leave it out"
    )


def check_picture(path: Path, height: int, width: int) -> None:
    """Raise VideoError for a picture with too many pixels to decode, show or scale to."""
    if height * width > MAX_PIXELS:
        raise VideoError(
            f"{path}: its pictures have {width:,}×{height:,} pixels, at most {MAX_PIXELS:,} are "
            "read; scale it down or leave it out"
        )


def check_count(path: Path, frames: int) -> int:
    """How many frames such a file can hold, a byte each; raises VideoError where it has more."""
    size = path.stat().st_size
    if frames > min(size, MAX_FRAMES):
        raise VideoError(
            f"{path}: claims {frames:,} frames in {size:,} bytes (at most one a byte and "
            f"{MAX_FRAMES:,} are read); copy it again or leave it out"
        )
    return min(size, MAX_FRAMES)


def check_times(path: Path, timestamps: Floats) -> None:
    """Raise VideoError for frame times [frames] that no recording has."""
    if not (np.diff(timestamps) > 0).all() or not timestamps[-1] <= MAX_DURATION_S:
        raise VideoError(
            f"{path}: its frames' times do not increase or span more than "
            f"{MAX_DURATION_S / 86400:.0f} days; repair it or leave it out: "
            f"ffmpeg -i {path.name} -c copy whole.mkv"
        )
