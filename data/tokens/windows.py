"""Windows of consecutive frames from a token store, for training and validation.

Shapes: B windows, T frames, R rows, C cols, 2 actions (speed, steering).
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
    """Every window of `frames` frames, `stride` apart, that crosses neither a drive nor a gap.

    Built from the store's index alone; finding one is O(log n) in the number of drives. Windows are
    numbered from 0 to below the length; others raise IndexError.

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
                f"no window of {frames} frames in {names or 'no drives'}: the longest run "
                f"without a gap is {longest} frames; use longer drives or shorter windows"
            )
        table = np.asarray(runs, np.int64)
        self._drive, self._begin, first, counts = table.T
        self._ends: Ints = np.cumsum(counts)
        # Where window 0 would start, were the run's numbers to go on downwards.
        self._offsets = first - (self._ends - counts) * stride
        self._drives, self._stride = tuple(drives), stride
        self._codes = drives[0].info.codebook_size
        # A window's frames, and the one before them, from its first.
        self._frames = np.arange(-1, frames)
        self._in_shard = np.array([drive.begin for drive in drives], np.int64)
        self._channels = np.array([drive.channels for drive in drives], np.bool_)
        self._all_known = bool(self._channels.all())
        # Of each drive's shard: a drive that opens it.
        opener = {(drive.store, drive.shard): number for number, drive in enumerate(drives)}
        self._opener = np.array([opener[drive.store, drive.shard] for drive in drives])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def places(self, numbers: Ints) -> tuple[Ints, Ints, Mask]:
        """Where windows are: their drives' positions, and their first frames in those.

        The mask says whether a frame comes right before each window, with no gap in between.
        """
        if numbers.min(initial=0) < 0:  # too large ones have no run
            raise IndexError(f"window {numbers.min()} of {len(self)}")
        run = np.searchsorted(self._ends, numbers, side="right")
        start = self._offsets[run] + numbers * self._stride
        return self._drive[run], start, start > self._begin[run]

    def load(self, numbers: Ints) -> dict[str, Tensor]:
        """Load windows as one batch, as `TokenWindows` describes it.

        Raises:
            DriveSimError: a token is not below the codebook's size.
        """
        drive, start, has_previous = self.places(numbers)
        alone = np.flatnonzero(~has_previous)
        rows = (start + self._in_shard[drive])[:, None] + self._frames
        rows[alone, 0] += 1  # any frame, where there is none before the window
        openers = self._opener[drive].tolist()
        shards = {n: self._drives[n].store.shard(self._drives[n].shard) for n in set(openers)}
        tokens, led = _gathered(shards, openers, "tokens", rows), rows[:, :-1]
        actions = _gathered(shards, openers, "actions", led)
        valid = _gathered(shards, openers, "action_valid", led)
        if not self._all_known:
            valid &= self._channels[drive][:, None]
        for column in (tokens, actions, valid):
            column[alone, 0] = 0
        if tokens.max() >= self._codes:
            raise DriveSimError(
                f"damaged token store: token {tokens.max()} of a codebook of {self._codes}; "
                "tokenize again"
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
    """Rows [B, ...] of a column, the i-th from the shard that drive `openers[i]` opened."""
    if len(shards) == 1:
        return shards[openers[0]][name].take(rows, axis=0)
    pairs = zip(openers, rows, strict=True)
    return np.stack([shards[number][name].take(its, axis=0) for number, its in pairs])


def _first_frame(drive: DriveTokens, begin: int) -> int:
    # A later part of a split drive does begin after a frame, which lies in another shard: give up
    # its first frame rather than claim that nothing came before.
    return begin + 1 if drive.entry.start > 0 and begin == 0 else begin


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Batches of random windows: `dataset[n]` is batch n, a function of (seed, n) only.

    A batch is `tokens` int64 [B, T, R, C]; `previous` int64 [B, R, C], the frame before the window,
    zeros where `has_previous` bool [B] is false; `actions` float32 [B, T, 2] and `action_valid`
    bool [B, T, 2], where actions[:, t] leads to frame t: invalid at 0 where nothing came before.

    Raises:
        DriveSimError: no drive is as long as a window, or there are fewer windows than a batch has.
    """

    def __init__(
        self, drives: Sequence[DriveTokens], *, frames: int, batch_size: int, seed: int = 0
    ) -> None:
        self.index = WindowIndex(drives, frames=frames)
        if batch_size > len(self.index):
            raise DriveSimError(
                f"data.batch_size={batch_size}: there are only {len(self.index)} windows of "
                f"{frames} frames to train on; lower it, or give more or longer drives"
            )
        self._batch_size, self._seed = batch_size, seed

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        # A hash is as random as a generator, and ten times as quick as seeding one.
        drawn = hashlib.shake_128(f"{self._seed}:{n}".encode()).digest(8 * self._batch_size)
        chosen = np.frombuffer(drawn, "<u8") % len(self.index)
        return self.index.load(chosen.astype(np.int64))


def sequential_windows(
    drives: Sequence[DriveTokens], *, frames: int, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Batches, as `TokenWindows` makes them, of windows side by side in order.

    What is left at the end of a drive is dropped; the last batch may be smaller. With `limit`, only
    that many windows, spread evenly over all of them.

    Raises:
        DriveSimError: no drive is as long as a window; at once, not when the first is taken.
    """
    index = WindowIndex(drives, frames=frames, stride=frames)
    count = len(index) if limit is None else min(limit, len(index))
    numbers = np.arange(count) * len(index) // max(count, 1)
    return (
        index.load(numbers[first : first + batch_size]) for first in range(0, count, batch_size)
    )
