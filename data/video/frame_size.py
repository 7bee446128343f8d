"""The size of the frames the models see, and how a picture of any shape is brought to it."""

from dataclasses import dataclass
from typing import Any

TRANSFORM_VERSION = 1
"""Raised whenever the same video would give other pixels."""


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
    """A resize of the displayed picture to `height` × `width`, then a crop of it."""

    height: int
    width: int
    rows: slice
    """The rows the crop keeps."""
    columns: slice
    """The columns the crop keeps."""


def fit(height: int, width: int, size: FrameSize | None) -> Fit:
    """Cover `size` with a `height` × `width` picture: aspect ratio kept, the centre cropped.

    Without a size the picture stays as it is.
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


def transform_description(size: FrameSize) -> dict[str, Any]:
    """What is done to every picture before a model sees it: a part of the models' fingerprints."""
    return {
        "version": TRANSFORM_VERSION,
        "height": size.height,
        "width": size.width,
        "resize": "bilinear, aspect ratio kept, centre crop",
        "colour": "RGB, by the stream's matrix and range, BT.601 limited where untagged",
    }
