"""Batches of single frames for the tokenizer, drawn from all drives alike.

Legend: B frames of a batch, N frames of all drives together, H height, W width.
"""

import multiprocessing
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from driving_sim.data.arrays import Floats, Ints, Pixels
from driving_sim.data.drive import SampledDrive
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line
from driving_sim.engine.progress import progress

_NEIGHBOURS = 4
"""Frames taken near each place of a drive where frames are decoded on demand."""
_NEIGHBOURHOOD = 16
"""Frames among which these neighbours are drawn."""


@dataclass(eq=False)
class FrameBatches(Dataset[dict[str, Tensor]]):
    """`dataset[n]` is batch n, {"frames": uint8 [B, H, W, 3]}: a function of (seed, n) only.

    Frames that fit in `cache_bytes` are decoded once, here. Loader workers share them: forked ones
    as they are, others through shared memory, which is where they are decoded if `shared`.
    Otherwise every batch decodes its own, a few neighbours at each place, because most of the cost
    is in reaching the place. With `mirror` every frame is flipped left to right half of the time;
    it is moved by up to `shift` pixels, and each colour's brightness changes by a share of up to
    `gain`. A share `cutmix` of a batch's frames get their right part, from a random column on, from
    the batch's next frame (CutMix, arXiv 1905.04899): such pictures cannot be learned by heart.

    Raises DriveSimError where the drives have no frames, fewer than a batch, or one that cannot be
    decoded.
    """

    drives: Sequence[SampledDrive]
    _: KW_ONLY
    size: FrameSize
    batch_size: int
    seed: int
    mirror: bool
    shift: int = 0
    gain: float = 0.0
    cutmix: float = 0.0
    shared: bool = False
    cache_bytes: int

    def __post_init__(self) -> None:
        self._offsets = np.cumsum([0, *(len(drive.indices) for drive in self.drives)])
        self.frame_count = int(self._offsets[-1])
        if self.frame_count == 0:
            raise DriveSimError("no frames to train on: the drives are empty")
        if self.batch_size > self.frame_count:
            raise DriveSimError(
                f"data.batch_size={self.batch_size}: there are only {self.frame_count} frames to "
                "train on; lower it, or give more or longer videos"
            )
        fits = self.frame_count * self.size.height * self.size.width * 3 <= self.cache_bytes
        self._cache = self._decode_all() if fits else None

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """Batch n; there is no last one."""
        generator = np.random.default_rng([self.seed, n])
        if self._cache is not None:
            chosen = generator.integers(self.frame_count, size=self.batch_size)
            frames = self._cache.numpy()[chosen]
        else:
            frames = self._decode(self._neighbours(generator))
        if self.mirror:
            _mirror(frames, np.flatnonzero(generator.random(self.batch_size) < 0.5))
        if self.shift:
            corners = generator.integers(2 * self.shift + 1, size=(self.batch_size, 2))
            _shift(frames, corners, self.shift)
        if self.gain:
            _amplify(frames, generator.uniform(1 - self.gain, 1 + self.gain, (self.batch_size, 3)))
        if self.cutmix:
            chosen = np.flatnonzero(generator.random(self.batch_size) < self.cutmix)
            _mix(frames, chosen, generator.integers(1, self.size.width, size=len(chosen)))
        return {"frames": torch.from_numpy(frames)}

    def _decode_all(self) -> Tensor:
        shape = (self.frame_count, self.size.height, self.size.width, 3)
        cache = torch.empty(shape, dtype=torch.uint8)
        if self.shared and _start_method() != "fork":
            _share(cache)  # before it is filled: then it is never held twice
        filled = cache.numpy()
        with progress(self.frame_count, "decode", "frames") as shown:
            for drive, start in zip(self.drives, self._offsets[:-1], strict=True):
                for frame in drive.drive.stream(self.size, drive.indices):
                    filled[start] = frame
                    start += 1
                    shown.advance(1)
        return cache

    def _neighbours(self, generator: np.random.Generator) -> Ints:
        """Draw B of the N frames, a few at each of some places; never across drives."""
        places = generator.integers(self.frame_count, size=-(-self.batch_size // _NEIGHBOURS))
        # Fixed stretches of a drive: so every frame is as likely as every other.
        drives = np.searchsorted(self._offsets, places, side="right") - 1
        starts = places - (places - self._offsets[drives]) % _NEIGHBOURHOOD
        stops = np.minimum(starts + _NEIGHBOURHOOD, self._offsets[drives + 1])
        bounds = zip(starts, stops, strict=True)
        chosen = [generator.integers(start, stop, size=_NEIGHBOURS) for start, stop in bounds]
        return np.concatenate(chosen)[: self.batch_size]

    def _decode(self, chosen: Ints) -> Pixels:
        frames = np.empty((len(chosen), self.size.height, self.size.width, 3), dtype=np.uint8)
        numbers = np.searchsorted(self._offsets, chosen, side="right") - 1
        for number in np.unique(numbers):
            inside, drive = numbers == number, self.drives[number]
            indices = drive.indices[chosen[inside] - self._offsets[number]]
            frames[inside] = drive.drive.frames(indices, self.size)
        return frames


def _start_method() -> str:
    """How processes are started here by default; asking for it does not settle it."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or multiprocessing.get_all_start_methods()[0]


def _share(cache: Tensor) -> None:
    try:
        cache.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise DriveSimError(
            f"{cache.nbytes / 1e9:.2g} GB of frames do not fit in shared memory "
            f"({one_line(error)}): lower data.cache_gigabytes, set training.workers=0, or give the "
            "container more (docker's --shm-size)"
        ) from error


def _mirror(frames: Pixels, chosen: Ints) -> None:
    """Flip the chosen frames left to right, in place."""
    for sample in chosen:
        original = frames[sample].copy()
        # By channel: five times faster than reversing pixels of three bytes.
        for channel in range(3):
            frames[sample, :, :, channel] = original[:, ::-1, channel]


def _shift(frames: Pixels, corners: Ints, most: int) -> None:
    """Crop each frame at its corner [B, 2] of itself with `most` pixels reflected around, in place.

    Corners are from 0 to 2 * `most`; at `most` nothing moves.
    """
    _, height, width, _ = frames.shape
    for frame, (y, x) in zip(frames, corners, strict=True):
        padded = np.pad(frame, ((most, most), (most, most), (0, 0)), mode="reflect")
        frame[:] = padded[y : y + height, x : x + width]


def _amplify(frames: Pixels, gains: Floats) -> None:
    """Multiply each frame's channels by its gains [B, 3], in place."""
    for frame, gain in zip(frames, gains.astype(np.float32), strict=True):
        frame[:] = np.minimum(frame * gain + 0.5, 255)


def _mix(frames: Pixels, chosen: Ints, columns: Ints) -> None:
    """Give the chosen frames the next frame's picture from their columns on, in place."""
    following = np.roll(frames, -1, axis=0)
    for sample, column in zip(chosen, columns, strict=True):
        frames[sample, :, column:] = following[sample, :, column:]
