"""Small video files whose frames carry their own number, for the tests of the readers."""

import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

HEIGHT, WIDTH, RATE = 48, 128, 20
_BITS = 8
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no real drives beside the checkout")


def numbered(number: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """A frame that shows `number` in binary, one bright or dark column per bit, over a gradient."""
    frame = np.empty((height, width, 3), dtype=np.uint8)
    bits = (number >> np.arange(_BITS)) & 1
    frame[:] = np.repeat(60 + 120 * bits, -(-width // _BITS))[None, :width, None]
    frame[height // 2 :] //= 2
    return frame


def read_number(frame: NDArray[np.uint8]) -> int:
    """The number that a frame shows."""
    columns = (np.arange(_BITS) + 0.5) * (-(-WIDTH // _BITS)) * frame.shape[1] / WIDTH
    row = frame[: frame.shape[0] // 3, columns.astype(int)].mean(axis=(0, 2))
    return int((row > 120) @ (1 << np.arange(_BITS)))


def read_numbers(frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[int]:
    """The numbers that frames show."""
    return [read_number(frame) for frame in frames]


def write_numbered(
    path: Path,
    *,
    count: int = 40,
    codec: str = "libx264",
    container: str | None = None,
    times_ms: Sequence[int] | None = None,
    keyframe_every: int = 12,
    height: int = HEIGHT,
    width: int = WIDTH,
    pixel_format: str = "yuv420p",
    aspect: Fraction | None = None,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode frames 0..count-1 at `times_ms` (50 ms apart by default)."""
    times_ms = range(0, count * 1000 // RATE, 1000 // RATE) if times_ms is None else times_ms
    options = {"g": str(keyframe_every)} | (codec_options or {})
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=RATE, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, time in enumerate(times_ms):
            picture = av.VideoFrame.from_ndarray(numbered(number, height, width), format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    return path


def cut(path: Path, fraction: float) -> Path:
    """Keep the first part of a file's bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    return path


def claim_size(path: Path, height: int, width: int) -> Path:
    """Write a huffyuv .avi, whose decoder knows the picture's size from the header only."""
    write_numbered(path, codec="huffyuv", container="avi", pixel_format="rgb24", count=4)
    content = bytearray(path.read_bytes())
    start = content.index(b"strf") + 12
    assert struct.unpack("<ii", content[start : start + 8]) == (WIDTH, HEIGHT)
    content[start : start + 8] = struct.pack("<ii", width, height)
    path.write_bytes(content)
    return path


def claim_frames(path: Path, frames: int) -> Path:
    """Write an .mp4 of 4 frames whose tables say that there are `frames`, of a byte each."""
    content = bytearray(write_numbered(path, count=4).read_bytes())
    sizes, times, chunks = (content.index(name) + 8 for name in (b"stsz", b"stts", b"stsc"))
    content[sizes : sizes + 8] = struct.pack(">II", 1, frames)
    content[times + 4 : times + 8] = struct.pack(">I", frames)
    content[chunks + 8 : chunks + 12] = struct.pack(">I", frames)
    path.write_bytes(content)
    return path


def change_size_midway(path: Path) -> Path:
    """Write 12 frames of 48×128 and then 12 of 96×256 into one raw .h264 stream."""
    parts = [
        write_numbered(path, container="h264", count=12, height=height, width=width).read_bytes()
        for height, width in ((HEIGHT, WIDTH), (2 * HEIGHT, 2 * WIDTH))
    ]
    path.write_bytes(b"".join(parts))
    return path


def make_hang(path: Path) -> Path:
    """Put a pipe that nobody writes to in a file's place: whoever opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)
    return path
