"""Baselines that only count tokens. They are measured in bits per token, as the model is.

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

# Added to the count of each code, so that unseen codes have a probability above 0 (the
# Krichevsky-Trofimov estimator).
_PSEUDO_COUNT = 0.5
_STRENGTHS = tuple(2.0**power for power in range(-2, 13))


@dataclass(frozen=True, slots=True)
class Unigram:
    """Predicts every token with the same probabilities, the code frequencies in training drives."""

    probabilities: Floats
    """[K]: probability of each code."""

    @classmethod
    def fit(cls, drives: Sequence[DriveTokens]) -> Self:
        """Count the codes in the training drives."""
        size = drives[0].info.codebook_size
        counts = np.full(size, _PSEUDO_COUNT)
        for drive in drives:
            counts += np.bincount(drive.tokens.ravel(), minlength=size)
        return cls(counts / counts.sum())

    def bits_per_token(self, windows: FullWindows) -> FrameBits:
        """Measure the bits and accuracy of the last frame of every window."""
        tokens, _ = windows.last_frames()
        bits = -np.log2(self.probabilities[tokens])
        right = tokens == self.probabilities.argmax()
        return windows.judged(bits.mean(1), right.mean(1))


@dataclass(frozen=True, slots=True)
class CopyLast:
    """Predicts the previous frame's token or, with probability `change`, a draw from `unigram`."""

    unigram: Unigram
    change: float
    """Probability e; token b after token a has probability `(1 - e) [a = b] + e u(b)`."""

    @classmethod
    def fit(cls, drives: Sequence[DriveTokens]) -> Self:
        """Choose the `change` that maximises the likelihood of the training drives."""
        unigram = Unigram.fit(drives)
        stayed, changed = [], 0
        for before, after in _transitions(drives):
            same = before == after
            stayed.append(unigram.probabilities[after[same]])
            changed += int((~same).sum())
        return cls(unigram, _most_likely_change(np.concatenate(stayed), changed))

    def bits_per_token(self, windows: FullWindows) -> FrameBits:
        """Measure the bits and accuracy of the last frame of every window."""
        tokens, last = windows.last_frames()
        probabilities = self.change * self.unigram.probabilities[tokens]
        probabilities += (1 - self.change) * (tokens == last)
        right = tokens == last
        return windows.judged(-np.log2(probabilities).mean(1), right.mean(1))


@dataclass(frozen=True, slots=True)
class TimeBigram:
    """Predicts token b from token a, which is at the same position in the previous frame.

    The probability is `(n(a, b) + s u(b)) / (n(a) + s)`, where n counts token pairs in the training
    drives, u is the unigram and s is `strength`. This is a Dirichlet prior, as in MacKay and Peto
    1995 (https://doi.org/10.1017/S1351324900000218).
    """

    unigram: Unigram
    strength: float
    pairs: Ints
    """The token pairs (a, b) that occurred, as numbers `a * K + b` in ascending order."""
    counts: Ints
    """Number of times that each token pair occurred."""
    totals: Ints
    """[K]: number of token pairs that begin with each code."""

    @classmethod
    def fit(cls, drives: Sequence[DriveTokens]) -> Self:
        """Count the token pairs, and choose the strength with the highest leave-one-out likelihood.

        Leave-one-out means that each pair is predicted from the counts without this pair.
        """
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
        """Measure the bits and accuracy of the last frame of every window."""
        tokens, last = windows.last_frames()
        bits = -np.log2(self._probability(last, tokens, 0))
        best = self._most_probable()
        return windows.judged(bits.mean(1), (best[last] == tokens).mean(1))

    def _probability(self, before: Ints, after: Ints, left_out: int) -> Floats:
        """Return for each i the probability that token `after[i]` follows token `before[i]`.

        `left_out` is subtracted from the count of the pair and from the total of `before[i]`.
        """
        codes = before * len(self.totals) + after
        place = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        count = np.where(self.pairs[place] == codes, self.counts[place], 0) - left_out
        prior = self.strength * self.unigram.probabilities[after]
        probability: Floats = (count + prior) / (self.totals[before] - left_out + self.strength)
        return probability

    def _left_out_likelihood(self) -> float:
        size = len(self.totals)
        probability = self._probability(self.pairs // size, self.pairs % size, 1)
        return float((self.counts * np.log(probability)).sum())

    def _most_probable(self) -> Ints:
        """Return the most probable next code after each code, [K]."""
        size, prior = len(self.totals), self.strength * self.unigram.probabilities
        best = np.full(size, prior.argmax())
        weight = self.counts + prior[self.pairs % size]
        order = np.argsort(weight, kind="stable")
        # Pairs are in ascending order of weight. Each assignment to `best` overwrites the earlier
        # ones for the same code, so the heaviest pair of each code remains.
        likely = self.pairs[order[weight[order] >= prior.max()]]
        best[likely // size] = likely % size
        return best


def _transitions(
    drives: Sequence[DriveTokens],
) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.uint16]]]:
    """Yield the tokens of consecutive frames as (before, after).

    There is one pair for each segment, which is a part of a drive without missing frames. `before`
    has all frames of the segment except the last, and `after` all frames except the first.
    """
    for drive in drives:
        for begin, stop in drive.entry.segments:
            tokens = drive.tokens[begin:stop]
            yield tokens[:-1], tokens[1:]


def _most_likely_change(stayed: Floats, changed: int) -> float:
    """Return the probability e of `CopyLast.change` that maximises the log-likelihood.

    `stayed` are the unigram probabilities of the tokens that equal the token before them. `changed`
    is the number of all other tokens. Uses bisection, because the log-likelihood is concave in e.
    """
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        change = (low + high) / 2
        slope = changed / change + ((stayed - 1) / (1 - change + change * stayed)).sum()
        low, high = (change, high) if slope > 0 else (low, change)
    # Do not return 0: a single changed token would then cost infinitely many bits.
    return max(low, math.ulp(1.0))
