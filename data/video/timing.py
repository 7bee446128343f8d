"""The times of frames: the file's own clock, made to run on, or a clock made up from a rate.

Legend: N packets of a stream, in the order in which they are stored.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.video.file import open_video, video_stream

RESTART_GAP_S = 10.0
"""Seconds that are made up between the frames before and after a restart of the clock. It is so
long that it is a gap at every frame rate that makes sense."""
FALLBACK_RATE = 25.0
"""Frames per second that are assumed if nothing says the rate."""
_SLACK_S = 0.1
_WRAPPING = ("mpegts", "mpeg")  # Their clocks have 33 bits.
_WRAP = 1 << 33
# FFmpeg reads these formats at the rate of its option `framerate`, unless the video stores one.
_RAW = (
    "h264",
    "hevc",
    "vvc",
    "m4v",
    "mpegvideo",
    "vc1",
    "h263",
    "mjpeg",
    "obu",
    "av1",
    "cavsvideo",
)
_MATROSKA_DURATION = re.compile(r"(\d+):(\d+):(\d+\.?\d*)")
_NO_RATE = "its frame rate is not stored"
_MOST_REORDERED = 16


class Clock:
    """Moves the times of packets, so that a clock that starts again goes on after a gap.

    Clocks start again where recordings were joined, or where a camera restarted. All packets of a
    stream must pass, from the first one on.
    """

    def __init__(self, stream: VideoStream) -> None:
        self.restarts: list[int] = []
        """Time of the first packet after each restart, in the stream's time base."""
        ticks = 1 / stream.time_base if stream.time_base else math.inf
        self._slack, self._gap = _SLACK_S * ticks, RESTART_GAP_S * ticks
        # FFmpeg takes a clock of 33 bits that starts again for one that wrapped around, and adds 26
        # hours. Later, it stops to do so.
        self._wraps = stream.container.format.name in _WRAPPING
        self._last: int | None = None
        self._end, self._shift = 0, 0

    def set(self, packet: "Packet[Any]") -> None:
        """Move the times of a packet that comes after a restart."""
        # Only decoding times always increase: display times go back and forth.
        dts, pts = packet.dts, packet.pts
        if dts is not None and self._wraps and self._last is not None:
            dts -= _nearest(dts - self._last)
            pts = None if pts is None else pts - _nearest(pts - dts)
        if dts is not None:
            if self._last is not None and dts - self._last < -self._slack:
                self.restarts.append(self._end + int(self._gap))
                self._shift = self.restarts[-1] - (dts if pts is None else pts)
                self._last = dts
            self._last = dts if self._last is None else max(self._last, dts)
        packet.dts = None if dts is None else dts + self._shift
        packet.pts = None if pts is None else pts + self._shift
        if packet.pts is not None:
            self._end = max(self._end, packet.pts)


def _nearest(ticks: int) -> int:
    """Return the multiple of the range of 33 bits that is nearest to a number of ticks."""
    return round(ticks / _WRAP) * _WRAP


def reordering(pts: Ints) -> int:
    """Return how many frames at most are stored after a frame [N] but displayed before it."""
    places = np.argsort(np.argsort(pts, kind="stable"), kind="stable")
    return min(_MOST_REORDERED, int((places - np.arange(len(pts))).max(initial=0)))


def nominal_rate(stream: VideoStream) -> float | None:
    """Return the frame rate of a stream, or None if nothing says it."""
    rate = stream.guessed_rate or stream.average_rate
    return float(rate) if rate else None


def declared_end(stream: VideoStream) -> float | None:
    """Return the end of the stream according to the header, in seconds on the stream's clock.

    Returns None if the header does not say it.
    """
    is_mov = stream.container.format.name.startswith("mov")
    if is_mov and stream.duration and stream.time_base:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    clock = _MATROSKA_DURATION.fullmatch(stream.metadata.get("DURATION", ""))
    if clock:
        hours, minutes, seconds = (float(part) for part in clock.groups())
        return 3600 * hours + 60 * minutes + seconds
    return None


def stores_rate(path: Path, stream: VideoStream) -> bool:
    """Return whether the frame rate comes from the file, and is not a default of FFmpeg."""
    rate = nominal_rate(stream)
    if rate is None or stream.container.format.name not in _RAW:
        return rate is not None
    # A made-up rate follows the option.
    with open_video(path, framerate="24" if rate != 24 else "25") as container:
        return nominal_rate(video_stream(container, path, stream.index)) == rate


def even_times(count: int, rate: float | None) -> Floats:
    """Return the times of `count` frames in seconds at a constant rate, by default 25 frames/s."""
    return np.arange(count, dtype=np.float64) / (rate or FALLBACK_RATE)


def about_rate(
    stream: VideoStream, *, is_stored: bool, is_timed: bool, video_fps: float | None
) -> str | None:
    """Return a notice about the frame rate of a video, or None if there is nothing to say."""
    rate = nominal_rate(stream) or FALLBACK_RATE
    if not is_stored and video_fps is not None:
        return f"{_NO_RATE}; {video_fps:g} frames/s are taken, as `video_fps` says"
    if not is_stored:
        return f"{_NO_RATE}; {rate:g} frames/s are assumed (set it with `video_fps`)"
    if video_fps is not None:
        return "`video_fps` is not used, because the file has its own times or frame rate"
    if not is_timed and stream.container.format.name not in (*_RAW, "avi"):
        return f"its frames have no times of their own; its frame rate of {rate:.4g} is taken"
    return None


def is_about_missing_rate(notice: str) -> bool:
    """Return whether a notice says that the file stores no frame rate."""
    return notice.startswith(_NO_RATE)


def about_restarts(restarts: Floats) -> str | None:
    """Return a notice about restarts of the clock at these times in seconds, or None."""
    if not len(restarts):
        return None
    often = "" if len(restarts) == 1 else f" and {len(restarts) - 1} more times"
    return (
        f"its clock starts again after {restarts[0] - RESTART_GAP_S:.1f} s{often} (files were "
        f"joined, or the camera restarted); what follows is read on after a made-up gap of "
        f"{RESTART_GAP_S:g} s"
    )


def about_left_out(stream: VideoStream, stored: NDArray[Any], pts: Ints) -> list[str]:
    """Return notices about the stored times [N] that no frame has in the end: those before the
    first frame, and those that several frames share."""
    notices = []
    distinct = np.unique(stored)
    if early := int((distinct < pts[0]).sum()):
        seconds = float((pts[0] - distinct[0]) * (stream.time_base or 0))
        notices.append(
            f"its first {early} frames ({seconds:.1f} s) cannot be decoded and are left out, "
            "because the keyframe before them is missing"
        )
    if same := len(stored) - len(distinct):
        frames = f"{same} frames have" if same > 1 else "1 frame has"
        notices.append(
            f"{frames} the time of another frame and {'are' if same > 1 else 'is'} left out"
        )
    return notices
