"""Frames into a video file that every player plays."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from numpy.typing import NDArray

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file

SMALL: Mapping[str, str] = {"preset": "veryfast"}
"""x264's options for files that are kept and read often."""
FAST: Mapping[str, str] = {"preset": "ultrafast", "x264-params": "cabac=1"}
"""For rollouts, which someone waits for: not deblocked, but with CABAC, which saves bytes."""


class VideoWriter:
    """H.264 (yuv420p, faststart) written frame by frame; the file appears only when complete.

    Odd heights and widths are padded by repeating the last row or column: the codec needs even
    ones. Use as a context manager; an exception inside leaves no file. `x264`: SMALL or FAST.

    Raises DriveSimError where the disk is full or the place may not be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: float,
        height: int,
        width: int,
        x264: Mapping[str, str] = SMALL,
    ) -> None:
        if not fps > 0:
            raise ValueError(f"fps={fps}: must be positive")
        self.path = path
        self.height = height
        self.width = width
        self._rate = Fraction(fps).limit_denominator(65535)
        self._options = {"crf": "18", **x264}
        self._frames = 0

    def __enter__(self) -> Self:
        """Open the temporary file."""
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_file(self.path))
            self._container = stack.enter_context(
                av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
            )
            self._stream = self._container.add_stream(
                "libx264", rate=self._rate, options=self._options
            )
            self._stream.pix_fmt = "yuv420p"
            self._stream.width = self.width + self.width % 2
            self._stream.height = self.height + self.height % 2
            # One picture for all frames: `encode` converts its colours before it returns.
            self._picture = av.VideoFrame(self._stream.width, self._stream.height, "rgb24")
            plane = self._picture.planes[0]
            lines = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)
            self._pixels = lines[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)
            self._open = stack.pop_all()
        return self

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Append one frame, uint8 RGB [height, width, 3]."""
        if frame.shape != (self.height, self.width, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"frame: {frame.dtype} {frame.shape}, expected uint8 {(self.height, self.width, 3)}"
            )
        self._pixels[: self.height, : self.width] = frame
        self._pixels[self.height :, : self.width] = frame[-1:]
        self._pixels[:, self.width :] = self._pixels[:, self.width - 1 : self.width]
        self._picture.pts = self._frames
        self._picture.time_base = 1 / self._rate
        self._frames += 1
        self._container.mux(self._stream.encode(self._picture))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file and give it its name, or remove it after an error."""
        if kind is not None:
            # Passes the error on to `atomic_file`, which says in one line what a full disk is.
            self._open.__exit__(kind, error, trace)
            return
        with self._open:
            if self._frames == 0:
                raise DriveSimError(f"{self.path}: no frames to write")
            self._container.mux(self._stream.encode(None))


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Write frames, uint8 RGB [height, width, 3] each (or an array of them), as H.264."""
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise DriveSimError(f"{path}: no frames to write")
    with VideoWriter(path, fps=fps, height=first.shape[0], width=first.shape[1]) as writer:
        writer.write(first)
        for frame in remaining:
            writer.write(frame)
