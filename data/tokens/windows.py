"""Windows of consecutive frames from a token store, for training and validation.

Shapes: B windows, T frames, R token rows, C token columns, 2 action channels (speed, steering).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from driving_sim.data.arrays import Ints, Mask
from driving_sim.data.tokens.store import Columns, DriveTokens
from driving_sim.engine.errors import DriveSimError, TooLittleDataError


class WindowIndex:
    """All windows of `frames` consecutive frames within a drive and without a gap in time.

    Windows start `stride` frames apart and are numbered from 0. Other numbers raise IndexError.
    Building the index reads no shards. Finding a window takes O(log n) time for n drives.

    Raises:
        TooLittleDataError: no drive is as long as a window.
    """

    def __init__(self, drives: Sequence[DriveTokens], *, frames: int, stride: int = 1) -> None:
        if frames < 1 or stride < 1:
            raise ValueError(f"frames and stride must be at least 1, got {frames} and {stride}")
        runs = [
            (number, begin, first, (stop - first - frames) // stride + 1)
            for number, drive in enumerate(drives)
            for begin, stop in drive.entry.segments
            for first in [_first_frame(drive, begin)]
            if stop - first >= frames
        ]
        if not runs:
            longest = max((b - a for d in drives for a, b in d.entry.segments), default=0)
            ids = list(dict.fromkeys(drive.id for drive in drives))
            names = ", ".join([*ids[:3], *(["..."] if len(ids) > 3 else [])])
            raise TooLittleDataError(
                f"no window of {frames} frames in {names or 'no drives'}: at most {longest} frames "
                "follow one another without a gap in time; use longer drives or shorter windows"
            )
        table = np.asarray(runs, np.int64)
        self._drive, self._begin, first, counts = table.T
        self._ends: Ints = np.cumsum(counts)
        # A run is a range of frames without a gap. Window numbers do not start again from 0 in each
        # run. So each run has an offset: window n starts at frame `offset + n * stride` of its
        # drive.
        self._offsets = first - (self._ends - counts) * stride
        self._drives, self._stride = tuple(drives), stride
        self._codes = drives[0].info.codebook_size
        # Positions of the frames to load, relative to the window's first frame: -1 is the frame
        # before the window.
        self._frames = np.arange(-1, frames)
        self._in_shard = np.array([drive.begin for drive in drives], np.int64)
        self._channels = np.array([drive.channels for drive in drives], np.bool_)
        self._all_known = bool(self._channels.all())
        # Map each drive to one representative drive of the same shard. `load` opens the shard
        # through that drive.
        opener = {(drive.store, drive.shard): number for number, drive in enumerate(drives)}
        self._opener = np.array([opener[drive.store, drive.shard] for drive in drives])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def places(self, numbers: Ints) -> tuple[Ints, Ints, Mask]:
        """Return the drive of each window, its first frame in the drive, and a mask.

        A drive is given by its position in the list of drives. The mask is true if there is a frame
        right before the window, without a gap in between.
        """
        # If a number is too large, NumPy raises IndexError below.
        if numbers.min(initial=0) < 0:
            raise IndexError(f"window {numbers.min()}: windows are numbered 0..{len(self) - 1}")
        run = np.searchsorted(self._ends, numbers, side="right")
        start = self._offsets[run] + numbers * self._stride
        return self._drive[run], start, start > self._begin[run]

    def load(self, numbers: Ints) -> dict[str, Tensor]:
        """Load windows as one batch, in the format of `TokenWindows`.

        Raises:
            DriveSimError: a token is outside the codebook.
        """
        drive, start, has_previous = self.places(numbers)
        no_previous = np.flatnonzero(~has_previous)
        rows = (start + self._in_shard[drive])[:, None] + self._frames
        # If there is no frame before a window, read the window's first frame in its place. Its
        # values are set to 0 below.
        rows[no_previous, 0] += 1
        openers = self._opener[drive].tolist()
        shards = {n: self._drives[n].store.shard(self._drives[n].shard) for n in set(openers)}
        tokens, action_rows = _gathered(shards, openers, "tokens", rows), rows[:, :-1]
        actions = _gathered(shards, openers, "actions", action_rows)
        valid = _gathered(shards, openers, "action_valid", action_rows)
        if not self._all_known:
            valid &= self._channels[drive][:, None]
        for column in (tokens, actions, valid):
            column[no_previous, 0] = 0
        if tokens.max() >= self._codes:
            raise DriveSimError(
                f"damaged token store: token {tokens.max()} is outside the codebook of "
                f"{self._codes} codes; tokenize the videos again"
            )
        return {
            "tokens": torch.from_numpy(tokens[:, 1:].astype(np.int64)),
            "previous": torch.from_numpy(tokens[:, 0].astype(np.int64)),
            "has_previous": torch.from_numpy(has_previous),
            "actions": torch.from_numpy(actions),
            "action_valid": torch.from_numpy(valid),
        }


def _gathered(
    shards: Mapping[int, Columns], openers: list[int], name: str, rows: Ints
) -> NDArray[Any]:
    """Return the values [B, n, ...] of a column for B windows.

    `rows` [B, n] are the row numbers to read for each window. Window i lies in the shard
    `shards[openers[i]]`.
    """
    if len(shards) == 1:
        return shards[openers[0]][name].take(rows, axis=0)
    pairs = zip(openers, rows, strict=True)
    return np.stack(
        [shards[number][name].take(window_rows, axis=0) for number, window_rows in pairs]
    )


def _first_frame(drive: DriveTokens, begin: int) -> int:
    # The frame before a window must lie in the same shard as the window. If a drive is split, the
    # frame before a later part lies in another shard. So no window begins at that part's first
    # frame.
    return begin + 1 if drive.entry.start > 0 and begin == 0 else begin


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Batches of random windows: `dataset[n]` is batch n, a function of (seed, n) only.

    A batch holds:

    - `tokens` int64 [B, T, R, C];
    - `previous` int64 [B, R, C], the tokens of the frame before the window, or zeros;
    - `has_previous` bool [B], whether there is a frame before the window;
    - `actions` float32 [B, T, 2], where actions[:, t] is applied from frame t - 1 to frame t;
    - `action_valid` bool [B, T, 2], false at t = 0 if there is no frame before the window.

    Raises:
        DriveSimError: no drive is as long as a window, or there are fewer windows than
            `batch_size`.
    """

    def __init__(
        self, drives: Sequence[DriveTokens], *, frames: int, batch_size: int, seed: int = 0
    ) -> None:
        self.index = WindowIndex(drives, frames=frames)
        if batch_size > len(self.index):
            raise DriveSimError(
                f"data.batch_size={batch_size}: there are only {len(self.index)} windows of "
                f"{frames} frames to train on; lower the batch size, or add drives"
            )
        self._batch_size, self._seed = batch_size, seed

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        # Draw windows with a hash: it is random enough, and ten times as fast as a new generator.
        drawn = hashlib.shake_128(f"{self._seed}:{n}".encode()).digest(8 * self._batch_size)
        chosen = np.frombuffer(drawn, "<u8") % len(self.index)
        return self.index.load(chosen.astype(np.int64))


def sequential_windows(
    drives: Sequence[DriveTokens], *, frames: int, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Return batches of adjacent windows in order, in the format of `TokenWindows`.

    Frames left over at the end of a range without gaps are dropped. The last batch may be smaller.
    `limit` is the maximum number of windows. If there are more, the returned windows are spread
    evenly over all drives.

    Raises:
        DriveSimError: no drive is as long as a window. The call raises this error, not the
            iterator.
    """
    index = WindowIndex(drives, frames=frames, stride=frames)
    count = len(index) if limit is None else min(limit, len(index))
    numbers = np.arange(count) * len(index) // max(count, 1)
    return (
        index.load(numbers[first : first + batch_size]) for first in range(0, count, batch_size)
    )
