"""What knowing nothing but counts is worth, in the same bits as the model's.

Axes: n frames, P tokens of a frame, K codes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.arrays import Floats, Ints
from driving_sim.data.tokens.store import DriveTokens
from driving_sim.world_model.training.bits import FrameBits, FullWindows

_PSEUDO_COUNT = 0.5  # Krichevsky-Trofimov: an unseen code is not impossible
_STRENGTHS = tuple(2.0**power for power in range(-2, 13))


@dataclass(frozen=True, slots=True)
class Unigram:
    """Every token drawn from the training drives' frequencies."""

    probabilities: Floats
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


@dataclass(frozen=True, slots=True)
class TimeBigram:
    """The token given the one before it at the same place: `(n(a, b) + s u(b)) / (n(a) + s)`.

    Counts of pairs, filled up with `strength` draws from the unigram: a Dirichlet prior, as in
    MacKay and Peto 1995 (https://doi.org/10.1017/S1351324900000218).
    """

    unigram: Unigram
    strength: float
    pairs: Ints
    """Codes of the pairs that occurred, `before * K + after`, ascending."""
    counts: Ints
    """How often each occurred."""
    totals: Ints
    """[K], how often each code was followed by any."""

    @classmethod
    def fit(cls, drives: Sequence[DriveTokens]) -> Self:
        """Count the pairs, and find the strength that best foretells each without itself."""
        unigram = Unigram.fit(drives)
        size = len(unigram.probabilities)
        codes = [
            before.astype(np.int64).ravel() * size + after.ravel()
            for before, after in _transitions(drives)
        ]
        pairs, counts = np.unique(np.concatenate(codes), return_counts=True)
        totals = np.zeros(size, np.int64)
        np.add.at(totals, pairs // size, counts)
        fits = [cls(unigram, strength, pairs, counts, totals) for strength in _STRENGTHS]
        return max(fits, key=cls._left_out_likelihood)

    def bits_per_token(self, windows: FullWindows) -> FrameBits:
        """Judge the last frame of every window."""
        tokens, last = windows.last_frames()
        bits = -np.log2(self._probability(last, tokens, 0))
        best = self._most_probable()
        return windows.judged(bits.mean(1), (best[last] == tokens).mean(1))

    def _probability(self, before: Ints, after: Ints, left_out: int) -> Floats:
        """Probabilities of `after` given `before`, with so many of each pair's own counts gone."""
        codes = before * len(self.totals) + after
        place = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        count = np.where(self.pairs[place] == codes, self.counts[place], 0) - left_out
        prior = self.strength * self.unigram.probabilities[after]
        found: Floats = (count + prior) / (self.totals[before] - left_out + self.strength)
        return found

    def _left_out_likelihood(self) -> float:
        size = len(self.totals)
        probability = self._probability(self.pairs // size, self.pairs % size, 1)
        return float((self.counts * np.log(probability)).sum())

    def _most_probable(self) -> Ints:
        """[K], the likeliest code after each."""
        size, prior = len(self.totals), self.strength * self.unigram.probabilities
        best = np.full(size, prior.argmax())
        weight = self.counts + prior[self.pairs % size]
        order = np.argsort(weight, kind="stable")
        # The heaviest pair of each code comes last, and the last assignment stays.
        likely = self.pairs[order[weight[order] >= prior.max()]]
        best[likely // size] = likely % size
        return best


def _transitions(
    drives: Sequence[DriveTokens],
) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.uint16]]]:
    """Yield the tokens of frames and of the frames after them, one run without a gap at a time."""
    for drive in drives:
        for begin, stop in drive.entry.segments:
            tokens = drive.tokens[begin:stop]
            yield tokens[:-1], tokens[1:]


def _most_likely_change(stayed: Floats, changed: int) -> float:
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
