"""Read frames that are stored as image files, one image for each frame."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from driving_sim.data.arrays import Ints, Pixels
from driving_sim.data.video.file import check_picture
from driving_sim.data.video.frame_size import FrameSize, fit
from driving_sim.engine.errors import BadDriveError, DriveSimError
from driving_sim.engine.parsing import one_line

_FORMATS = ("JPEG", "PNG", "BMP")


def _picture(path: Path, size: FrameSize | None) -> Pixels:
    """Read an image, then scale and crop it as the video readers do."""
    try:
        with Image.open(path, formats=_FORMATS) as file:
            check_picture(path, file.height, file.width)
            image = file.convert("RGB")
    except DriveSimError:
        raise
    # Catch everything, because a damaged image can raise any kind of error. Pillow only warns about
    # very large images. If the user turns warnings into errors, this warning is caught here too,
    # which is right: `check_picture` would refuse such an image anyway.
    except Exception as error:
        reason = one_line(error)
        raise BadDriveError(f"{path}: cannot be read as an image ({reason})") from None
    geometry = fit(image.height, image.width, size)
    check_picture(path, geometry.height, geometry.width)
    scaled = image.resize((geometry.width, geometry.height), Image.Resampling.BILINEAR)
    return np.array(scaled)[geometry.rows, geometry.columns]


@dataclass(frozen=True, slots=True, eq=False)
class ImageFrames:
    """Frames stored as image files, one image for each frame."""

    paths: tuple[Path, ...]

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read a few frames [n, H, W, 3] in any order."""
        return np.stack([_picture(self.paths[index], size) for index in indices])

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        """Yield frames [H, W, 3] at ascending `indices`, or all frames if it is None."""
        numbers = range(len(self.paths)) if indices is None else indices
        return (_picture(self.paths[index], size) for index in numbers)

    def files(self, indices: Ints) -> list[Path]:
        """Return the image files of the frames at `indices`."""
        return [self.paths[index] for index in indices]
