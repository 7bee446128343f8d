"""The size of the frames that models see, and how a picture is turned, scaled and cropped to it."""

import math
import struct
from dataclasses import dataclass
from typing import Any

TRANSFORM_VERSION = 1
"""Version of scaling and cropping. Increase it when a change alters the pixels of frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameSize:
    """Height and width of a frame in pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How to resize a displayed picture (to `height` × `width` pixels) and then crop it."""

    height: int
    width: int
    rows: slice
    """Rows of the resized picture that the crop keeps."""
    columns: slice
    """Columns of the resized picture that the crop keeps."""


def fit(height: int, width: int, size: FrameSize | None) -> Fit:
    """Return how to resize and crop a `height` × `width` picture to exactly `size`.

    The picture keeps its aspect ratio, and the crop keeps its centre. If `size` is None, the
    picture does not change.
    """
    size = size or FrameSize(height=height, width=width)
    scale = max(size.height / height, size.width / width)
    scaled_height = max(size.height, round(height * scale))
    scaled_width = max(size.width, round(width * scale))
    top, left = (scaled_height - size.height) // 2, (scaled_width - size.width) // 2
    return Fit(
        height=scaled_height,
        width=scaled_width,
        rows=slice(top, top + size.height),
        columns=slice(left, left + size.width),
    )


def orientation(rotation: float, matrix: bytes | None) -> tuple[int, bool]:
    """Return by how many degrees a picture is rotated anticlockwise, and whether it is then flipped
    left to right.

    `rotation` is the angle that FFmpeg computes from the display matrix, which is right if the
    matrix does not mirror. The matrix moves a pixel (x, y) to (a x + c y, b x + d y).
    """
    a, b, _, c, d = (0,) * 5 if matrix is None else struct.unpack_from("<5i", matrix)
    mirrored = a * d - b * c < 0
    if mirrored:
        # The rotation that gives the matrix if the flip x -> -x follows it.
        rotation = -math.degrees(math.atan2(b, -a))
    return round(rotation / 90) % 4 * 90, mirrored


def transform_description(size: FrameSize) -> dict[str, Any]:
    """Return how pictures become frames of this size, as part of the fingerprint of a model."""
    return {
        "version": TRANSFORM_VERSION,
        "height": size.height,
        "width": size.width,
        "resize": "bilinear, aspect ratio kept, centre crop",
        "colour": "RGB, by the stream's matrix and range, BT.601 limited where untagged",
    }
