"""Random batches of frames for training the tokenizer. All frames are equally likely.

Legend: B frames in a batch, N frames in all drives together, H height, W width.
"""

import multiprocessing
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from driving_sim.data.arrays import Floats, Ints, Mask, Pixels
from driving_sim.data.drive import SampledDrive
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line
from driving_sim.engine.progress import progress

_NEIGHBOURS = 4
"""If the frames are not cached, a batch takes this many frames from each of several short stretches
of the drives."""
_DRAWS = 100
_NEIGHBOURHOOD = 16
"""Number of consecutive frames in such a stretch. The last stretch of a drive may be shorter."""


@dataclass(eq=False)
class FrameBatches(Dataset[dict[str, Tensor]]):
    """Random batches of frames: `dataset[n]` is {"frames": uint8 [B, H, W, 3]}.

    Batch n depends only on `seed` and n.

    If all frames fit in `cache_bytes`, the constructor decodes them once and caches them. Forked
    loader workers inherit the cache. If workers are not forked, set `shared`, which puts the cache
    in shared memory. If the frames do not fit, each batch decodes its own frames. They come from a
    few short stretches of the videos, because seeking takes most of the time. Frames that are lost
    to damage are left out.

    `mirror` flips each frame left to right with probability 0.5. `shift` is the largest random
    shift in pixels. `gain` is the largest relative change of a colour's brightness. `cutmix` is the
    share of frames whose part to the right of a random column is replaced with that of the next
    frame in the batch, so that the model cannot memorise pictures (CutMix, arXiv 1905.04899).

    Raises DriveSimError if the drives have too few frames for a batch, or if a frame cannot be
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
        """Return batch n, for any n >= 0. The number of batches is unlimited."""
        generator = np.random.default_rng([self.seed, n])
        if self._cache is not None:
            chosen = generator.integers(len(self._cache), size=self.batch_size)
            frames = self._cache.numpy()[chosen]
        else:
            frames = self._decode_intact(generator)
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
            # Share the cache before filling it, because sharing copies the content.
            _share(cache)
        filled = cache.numpy()
        intact = 0
        with progress(self.frame_count, "decode", "frames") as bar:
            for drive in self.drives:
                for frame in drive.drive.stream_with_losses(self.size, drive.indices):
                    if frame is not None:
                        filled[intact] = frame
                        intact += 1
                    bar.advance(1)
        if intact == 0:
            raise DriveSimError("no frames to train on: all frames are damaged")
        return cache[:intact]

    def _neighbours(self, generator: np.random.Generator) -> Ints:
        """Draw B of the N frames: a few frames from each of several random stretches."""
        # Each drive is divided into stretches that do not overlap. The probability of drawing a
        # stretch is proportional to its number of frames, so all frames are equally likely.
        places = generator.integers(self.frame_count, size=-(-self.batch_size // _NEIGHBOURS))
        drives = np.searchsorted(self._offsets, places, side="right") - 1
        starts = places - (places - self._offsets[drives]) % _NEIGHBOURHOOD
        stops = np.minimum(starts + _NEIGHBOURHOOD, self._offsets[drives + 1])
        bounds = zip(starts, stops, strict=True)
        chosen = [generator.integers(start, stop, size=_NEIGHBOURS) for start, stop in bounds]
        return np.concatenate(chosen)[: self.batch_size]

    def _decode_intact(self, generator: np.random.Generator) -> Pixels:
        """Decode frames that are drawn at random. Draw others for those that are lost to damage."""
        frames, lost = self._decode(self._neighbours(generator))
        for _ in range(_DRAWS):
            if not lost.any():
                return frames
            frames[lost], lost[lost] = self._decode(self._neighbours(generator)[lost])
        raise DriveSimError(
            f"after {_DRAWS} draws, a random batch still contained damaged frames; leave the "
            "damaged drives out"
        )

    def _decode(self, chosen: Ints) -> tuple[Pixels, Mask]:
        """Return the chosen frames [B], and which of them are lost to damage [B]."""
        frames = np.zeros((len(chosen), self.size.height, self.size.width, 3), dtype=np.uint8)
        lost = np.zeros(len(chosen), np.bool_)
        numbers = np.searchsorted(self._offsets, chosen, side="right") - 1
        for number in np.unique(numbers):
            inside, drive = np.flatnonzero(numbers == number), self.drives[number]
            indices = drive.indices[chosen[inside] - self._offsets[number]]
            distinct, places = np.unique(indices, return_inverse=True)
            # Stream the frames: `Drive.frames` may use decord, which does not notice all damage.
            decoded = list(drive.drive.stream_with_losses(self.size, distinct))
            for slot, place in zip(inside, places, strict=True):
                frame = decoded[place]
                if frame is None:
                    lost[slot] = True
                else:
                    frames[slot] = frame
        return frames, lost


def _start_method() -> str:
    """Return the method by which this process starts workers, such as "fork".

    If no method is set yet, returns the default, but does not set it. A plain `get_start_method()`
    would set it, and the user could then no longer choose another method.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or multiprocessing.get_all_start_methods()[0]


def _share(cache: Tensor) -> None:
    try:
        cache.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise DriveSimError(
            f"{cache.nbytes / 1e9:.2g} GB of frames do not fit in shared memory "
            f"({one_line(error)}): lower data.cache_gigabytes, set training.workers=0, or give the "
            "container more shared memory (docker's --shm-size)"
        ) from error


def _mirror(frames: Pixels, chosen: Ints) -> None:
    """Flip the chosen frames left to right, in place."""
    for sample in chosen:
        original = frames[sample].copy()
        # Flipping one channel at a time is five times faster than flipping all three at once.
        for channel in range(3):
            frames[sample, :, :, channel] = original[:, ::-1, channel]


def _shift(frames: Pixels, corners: Ints, most: int) -> None:
    """Move each frame in place: pad it by `most` reflected pixels and crop it at its corner [B, 2].

    The coordinates (y, x) of a corner go from 0 to 2 * `most`. At (`most`, `most`), the frame does
    not move.
    """
    _, height, width, _ = frames.shape
    for frame, (y, x) in zip(frames, corners, strict=True):
        padded = np.pad(frame, ((most, most), (most, most), (0, 0)), mode="reflect")
        frame[:] = padded[y : y + height, x : x + width]


def _amplify(frames: Pixels, gains: Floats) -> None:
    """Multiply the channels of each frame by its gains [B, 3], in place."""
    for frame, gain in zip(frames, gains.astype(np.float32), strict=True):
        frame[:] = np.minimum(frame * gain + 0.5, 255)


def _mix(frames: Pixels, chosen: Ints, columns: Ints) -> None:
    """Overwrite each chosen frame in place, from its column to the right, with the next frame."""
    following = np.roll(frames, -1, axis=0)
    for sample, column in zip(chosen, columns, strict=True):
        frames[sample, :, column:] = following[sample, :, column:]
