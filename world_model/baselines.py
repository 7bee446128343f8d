"""What knowing nothing but counts is worth, in the same bits as the model's.

Axes: n frames, P tokens of a frame, K codes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.token_store import DriveTokens
from driving_sim.world_model.bits import FrameBits, FullWindows

_PSEUDO_COUNT = 0.5  # Krichevsky-Trofimov: an unseen code is not impossible


@dataclass(frozen=True, slots=True)
class Unigram:
    """Every token drawn from the training drives' frequencies."""

    probabilities: NDArray[np.float64]
    """[K]."""

    @classmethod
    def fit(cls, drives: Sequence[DriveTokens]) -> Self:
        """Count the tokens of the training drives."""
        size = drives[0].info.codebook_size
        counts = np.full(size, _PSEUDO_COUNT)
        for drive in drives:
            counts += np.bincount(drive.tokens.ravel(), minlength=size)
        return cls(counts / counts.sum())

    def bits_per_token(self, windows: FullWindows) -> FrameBits:
        """Judge the last frame of every window."""
        tokens, _ = windows.last_frames()
        bits = -np.log2(self.probabilities[tokens])
        right = tokens == self.probabilities.argmax()
        return windows.judged(bits.mean(1), right.mean(1))


@dataclass(frozen=True, slots=True)
class CopyLast:
    """The token of the frame before, or with probability `change` a unigram draw."""

    unigram: Unigram
    change: float
    """e in `(1 - e) [last] + e unigram`."""

    @classmethod
    def fit(cls, drives: Sequence[DriveTokens]) -> Self:
        """Find the `change` of greatest likelihood on the training drives, by bisection."""
        unigram = Unigram.fit(drives)
        stayed, changed = [], 0
        for before, after in _transitions(drives):
            same = before == after
            stayed.append(unigram.probabilities[after[same]])
            changed += int((~same).sum())
        return cls(unigram, _most_likely_change(np.concatenate(stayed), changed))

    def bits_per_token(self, windows: FullWindows) -> FrameBits:
        """Judge the last frame of every window."""
        tokens, last = windows.last_frames()
        probabilities = self.change * self.unigram.probabilities[tokens]
        probabilities += (1 - self.change) * (tokens == last)
        right = tokens == last
        return windows.judged(-np.log2(probabilities).mean(1), right.mean(1))


def _transitions(
    drives: Sequence[DriveTokens],
) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.uint16]]]:
    """Yield the tokens of frames and of the frames after them, one run without a gap at a time."""
    for drive in drives:
        for begin, stop in drive.entry.segments:
            tokens = drive.tokens[begin:stop]
            yield tokens[:-1], tokens[1:]


def _most_likely_change(stayed: NDArray[np.float64], changed: int) -> float:
    """Solve for e where the log-likelihood, which is concave in e, is greatest.

    `stayed` holds the unigram probabilities of the tokens that stayed; `changed` counts the rest.
    """
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        change = (low + high) / 2
        slope = changed / change + ((stayed - 1) / (1 - change + change * stayed)).sum()
        low, high = (change, high) if slope > 0 else (low, change)
    # Never quite 0: then a single change would cost infinitely many bits.
    return max(low, math.ulp(1.0))
