"""Windows of consecutive frames from a token store, for training and validation.

Shapes: B windows, T frames, R rows, C cols, 2 actions (speed, steering).
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from driving_sim.data.token_store import DriveTokens
from driving_sim.engine.errors import DriveSimError, TooLittleDataError


class Window(NamedTuple):
    """Where a window lies."""

    drive: int
    """Position of its drive in the sequence of drives."""
    start: int
    """Its first frame in that drive."""
    has_previous: bool
    """Whether the frame before it is there, with no gap in between."""


class WindowIndex:
    """Every window of `frames` frames, `stride` apart, that crosses neither a drive nor a gap.

    Built from the store's index alone; finding one is O(log n) in the number of drives.
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
        table = np.asarray(runs, np.int64).reshape(-1, 4)
        self._drive, self._begin, first, counts = table.T
        self._ends: NDArray[np.int64] = np.cumsum(counts)
        # Where window 0 would start, were the run's numbers to go on downwards.
        self._offsets = first - (self._ends - counts) * stride
        self._stride = stride

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def __getitem__(self, n: int) -> Window:
        if not 0 <= n < len(self):
            raise IndexError(f"window {n} of {len(self)}")
        return self.select(np.array([n]))[0]

    def select(self, numbers: NDArray[np.int64]) -> list[Window]:
        """The windows with these numbers, each from 0 to below the length."""
        run = np.searchsorted(self._ends, numbers, side="right")
        start = self._offsets[run] + numbers * self._stride
        parts = self._drive[run], start, start > self._begin[run]
        return [Window(*each) for each in zip(*(part.tolist() for part in parts), strict=True)]


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
        DriveSimError: no drive is as long as a window.
    """

    def __init__(
        self,
        drives: Sequence[DriveTokens],
        *,
        frames: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        self.index = _index(drives, frames)
        self._drives = tuple(drives)
        self._frames, self._batch_size, self._seed = frames, batch_size, seed

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        # A hash is as random as a generator, and ten times as quick as seeding one.
        drawn = hashlib.shake_128(f"{self._seed}:{n}".encode()).digest(8 * self._batch_size)
        chosen = (np.frombuffer(drawn, "<u8") % len(self.index)).astype(np.int64)
        return load_windows(self._drives, self.index.select(chosen), self._frames)


def sequential_windows(
    drives: Sequence[DriveTokens], *, frames: int, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Batches, as `TokenWindows` makes them, of windows side by side in order.

    What is left at the end of a drive is dropped; the last batch may be smaller. With `limit`, only
    that many windows, spread evenly over all of them.

    Raises:
        DriveSimError: no drive is as long as a window; at once, not when the first is taken.
    """
    index = _index(drives, frames, stride=frames)
    count = len(index) if limit is None else min(limit, len(index))
    windows = index.select(np.arange(count) * len(index) // max(count, 1))
    return (
        load_windows(drives, windows[first : first + batch_size], frames)
        for first in range(0, count, batch_size)
    )


def _index(drives: Sequence[DriveTokens], frames: int, stride: int = 1) -> WindowIndex:
    index = WindowIndex(drives, frames=frames, stride=stride)
    if not len(index):
        longest = max((b - a for d in drives for a, b in d.entry.segments), default=0)
        ids = list(dict.fromkeys(drive.id for drive in drives))
        names = ", ".join([*ids[:3], *(["..."] if len(ids) > 3 else [])])
        raise TooLittleDataError(
            f"no window of {frames} frames in {names or 'no drives'}: the "
            f"longest run without a gap is {longest} frames; use longer drives or shorter windows"
        )
    return index


def load_windows(
    drives: Sequence[DriveTokens], windows: Sequence[Window], frames: int
) -> dict[str, Tensor]:
    """Load windows of `frames` frames as one batch, as `TokenWindows` describes it.

    Raises:
        DriveSimError: a token is not below the codebook's size.
    """
    info = drives[0].info
    # One frame more than the window: what came before it. Converted once, and not window by window.
    tokens = np.empty((len(windows), frames + 1, info.rows, info.cols), np.uint16)
    actions = np.empty((len(windows), frames, 2), np.float32)
    valid = np.empty((len(windows), frames, 2), np.bool_)
    for row, (number, start, has_previous) in enumerate(windows):
        missing = 0 if has_previous else 1
        if missing:
            tokens[row, 0] = actions[row, 0] = valid[row, 0] = 0
        seen, acted, known = drives[number].span(start - 1 + missing, start + frames)
        tokens[row, missing:] = seen
        actions[row, missing:] = acted[:-1]
        valid[row, missing:] = known[:-1]
    if tokens.max(initial=0) >= info.codebook_size:
        raise DriveSimError(
            f"damaged token store: token {tokens.max()} of a codebook of {info.codebook_size}; "
            "tokenize again"
        )
    return {
        "tokens": torch.from_numpy(tokens[:, 1:].astype(np.int64)),
        "previous": torch.from_numpy(tokens[:, 0].astype(np.int64)),
        "has_previous": torch.tensor([window.has_previous for window in windows]),
        "actions": torch.from_numpy(actions),
        "action_valid": torch.from_numpy(valid),
    }
