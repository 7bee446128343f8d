"""Read frames that are stored as image files, one image for each frame."""

import warnings
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
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP = ("I", "F")  # Pillow would clip these pixels of 16 or 32 bits to 8 bits.


# Pillow warns about damaged EXIF data, whose picture may be good. `warnings.catch_warnings` cannot
# silence it here, because pictures are read in several threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class _DamagedError(BadDriveError):
    """The content of an image file is damaged, but the file can be read."""


def picture_size(path: Path) -> tuple[int, int] | None:
    """Return the width and the height in pixels of an image, or None if it cannot be read."""
    try:
        with Image.open(path, formats=_FORMATS) as file:
            return file.size
    except Exception:  # A damaged image can raise any kind of error.
        return None


def _turned(image: Image.Image, exif: Image.Image) -> Image.Image:
    """Turn an image as the EXIF data of its file says. If they are damaged, leave it as it is."""
    try:
        turn = _TURNS.get(exif.getexif().get(_ORIENTATION, 1))
    except Exception:  # Damaged data can raise any kind of error.
        return image
    return image if turn is None else image.transpose(turn)


def _picture(path: Path, size: FrameSize | None) -> Pixels:
    """Read an image, then turn, scale and crop it as the video readers do."""
    try:
        with Image.open(path, formats=_FORMATS) as file:
            check_picture(path, file.height, file.width)
            if file.mode.startswith(_DEEP):
                raise BadDriveError(
                    f"{path}: has pixels of more than 8 bits; convert the pictures to 8 bits"
                )
            image = _turned(file.convert("RGB"), file)
    except DriveSimError:
        raise
    # Catch everything, because a damaged image can raise any kind of error. Pillow only warns about
    # very large images. If the user turns warnings into errors, this warning is caught here too,
    # which is right: `check_picture` would refuse such an image anyway.
    except Exception as error:
        # Only errors of the system, such as that for a missing file, have a number.
        kind = BadDriveError if getattr(error, "errno", None) else _DamagedError
        raise kind(f"{path}: cannot be read as an image ({one_line(error)})") from None
    geometry = fit(image.height, image.width, size)
    check_picture(path, geometry.height, geometry.width)
    scaled = image.resize((geometry.width, geometry.height), Image.Resampling.BILINEAR)
    return np.array(scaled)[geometry.rows, geometry.columns]


@dataclass(frozen=True, slots=True, eq=False)
class ImageFrames:
    """Frames stored as image files, one image for each frame."""

    paths: tuple[Path, ...]

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read a few frames [n, H, W, 3] in any order.

        Raises DriveSimError for a damaged image, and for images of several sizes without a `size`.
        """
        frames = [_picture(self.paths[index], size) for index in indices]
        for index, frame in zip(indices, frames, strict=True):
            self._check_shape(index, frame, frames[0])
        return np.stack(frames)

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels | None]:
        """Yield frames [H, W, 3] at ascending `indices`, or all frames if it is None. A frame whose
        image is damaged is None."""
        first: Pixels | None = None
        for index in range(len(self.paths)) if indices is None else indices:
            try:
                frame = _picture(self.paths[index], size)
            except _DamagedError:
                yield None
                continue
            first = frame if first is None else first
            self._check_shape(index, frame, first)
            yield frame

    def _check_shape(self, index: int, frame: Pixels, first: Pixels) -> None:
        if frame.shape != first.shape:
            raise BadDriveError(
                f"{self.paths[index]}: has {frame.shape[1]}×{frame.shape[0]} pixels, but other "
                f"pictures of the drive have {first.shape[1]}×{first.shape[0]}; scale them equally"
            )

    def files(self, indices: Ints) -> list[Path]:
        """Return the image files of the frames at `indices`."""
        return [self.paths[index] for index in indices]
