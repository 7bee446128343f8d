"""Write frames as video files that every player can play, or as animated images."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, count
from pathlib import Path

import av
import numpy as np
from PIL import Image

from driving_sim.data.arrays import Pixels
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file

SMALL: Mapping[str, str] = {"preset": "veryfast"}
"""x264 options that make small files, for videos that are kept and read often."""
FAST: Mapping[str, str] = {"preset": "ultrafast", "x264-params": "cabac=1"}
"""x264 options for fast encoding, used for rollouts because a user waits for them. CABAC, which the
preset `ultrafast` turns off, is kept because it makes files smaller."""


@contextmanager
def video_writer(
    path: Path, *, fps: float, height: int, width: int, x264: Mapping[str, str] = SMALL
) -> Iterator[Callable[[Pixels], None]]:
    """Write an H.264 video (yuv420p, faststart) frame by frame.

    Yields a function that appends one frame, uint8 RGB [height, width, 3]. The codec needs even
    sizes, so odd heights and widths are padded by repeating the last row or column. `x264` is SMALL
    or FAST. The file appears when it is complete. If the `with` block raises an exception, no file
    is written.

    Raises DriveSimError if the disk is full or `path` cannot be written.
    """
    if not fps > 0:
        raise ValueError(f"fps={fps}: must be positive")
    rate = Fraction(fps).limit_denominator(65535)
    numbers = count()
    with (
        atomic_file(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18", **x264})
        stream.pix_fmt = "yuv420p"
        stream.width = width + width % 2
        stream.height = height + height % 2
        # Every frame reuses this picture, because `encode` converts its colours before it returns.
        picture = av.VideoFrame(stream.width, stream.height, "rgb24")
        picture.time_base = 1 / rate
        plane = picture.planes[0]
        lines = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)
        pixels = lines[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)

        def write(frame: Pixels) -> None:
            if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
                raise ValueError(
                    f"frame: {frame.dtype} {frame.shape}, expected uint8 {(height, width, 3)}"
                )
            pixels[:height, :width] = frame
            pixels[height:, :width] = frame[-1:]
            pixels[:, width:] = pixels[:, width - 1 : width]
            picture.pts = next(numbers)
            container.mux(stream.encode(picture))

        yield write
        if next(numbers) == 0:
            raise DriveSimError(f"{path}: no frames to write")
        container.mux(stream.encode(None))


def write_video(path: Path, frames: Iterable[Pixels], fps: float) -> None:
    """Write frames as an H.264 video. Each frame is uint8 RGB [height, width, 3]."""
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise DriveSimError(f"{path}: no frames to write")
    with video_writer(path, fps=fps, height=first.shape[0], width=first.shape[1]) as write:
        for frame in chain([first], remaining):
            write(frame)


def write_animation(path: Path, frames: Iterable[Pixels], fps: float) -> None:
    """Write frames as an animated WebP that loops. Each frame is uint8 RGB [height, width, 3]."""
    images = [Image.fromarray(frame) for frame in frames]
    if not images:
        raise DriveSimError(f"{path}: no frames to write")
    with atomic_file(path) as temporary:
        images[0].save(
            temporary,
            "WEBP",
            save_all=True,
            append_images=images[1:],
            duration=round(1000 / fps),
            loop=0,
            quality=85,
            method=6,
        )
