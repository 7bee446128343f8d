"""Detect when a rollout stops looking like a drive: drift, blur, freezes, loops and noise.

No ideal rollout exists to compare with. So every bound is derived from similar real footage that
was encoded and decoded by the same tokenizer.

Legend: N frames, r c token rows and columns, K codes, B blocks of frames.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from driving_sim.data.arrays import Floats, Ints, Mask, Pixels
from driving_sim.data.inspect.motion import picture_change
from driving_sim.engine.config import InnerShare, Positive, config, require
from driving_sim.engine.errors import TooLittleDataError

_LOW, _HIGH = 0.01, 0.99
# To find the period of a loop, measure how many tokens a frame shares with the frame a lag earlier
# (`agreement`). The period is not the lag with the highest agreement: a loop of 3 s also agrees
# with itself after 6 s and 9 s, and noise decides which agreement is highest. So take the shortest
# lag that reaches this share of the highest agreement.
_NEARLY_HIGHEST = 0.9


@config
class StabilityConfig:
    """Settings that decide when a rollout no longer counts as a drive."""

    block_s: Positive = 5.0
    """Length in s of the blocks whose token histograms are compared with real footage."""
    hop_s: Positive = 1.0
    """Time in s from the start of one block to the start of the next, at most `block_s`."""
    drift_margin: InnerShare = 0.2
    """Tolerance for drift, from 0 to 1.

    A block has drifted if the divergence of its token histogram is above a bound. At 0 the bound is
    the highest divergence of a block of real footage. At 1 it is 1 bit, the highest possible.
    """
    sharpness_factor: Positive = 1.5
    """Tolerance for sharpness, as a factor.

    The lower bound is the 1st percentile of real frames divided by this factor. The upper bound is
    the 99th percentile multiplied by it.
    """
    freeze_factor: InnerShare = 0.5
    """Bound for frozen frames, as a share of the smallest changes in real footage.

    A frame is frozen if the car should move but the picture hardly changes. The bound for the
    change is this share of the 1st percentile of the changes in real footage of a moving car.
    """
    restless_factor: Positive = 0.3
    """Bound for restless frames, in which too few tokens stay the same from frame to frame.

    Continuity is the share of tokens that stay the same, averaged over `hold_s`. The bound is this
    share of the lowest continuity in real footage. It detects noise with a realistic token
    histogram, which the bounds for drift and sharpness may miss.
    """
    min_lag_s: Positive = 2.0
    """Shortest time in s after which a repeated picture counts as a loop."""
    max_lag_s: Positive = 30.0
    """Longest time in s after which a repeated picture counts as a loop.

    After a longer time, a real car on a circuit may pass the same place again.
    """
    loop_s: Positive = 1.0
    """A repetition counts as a loop only if it lasts at least this long, in s."""
    loop_margin: InnerShare = 0.25
    """Tolerance for repetition, from 0 to 1.

    A frame is part of a loop if its `repetition` is above a bound. At 0 the bound is the highest
    repetition in real footage. At 1 it is 1, which means perfect repetition.
    """
    hold_s: Positive = 2.0
    """Time in s for which faults must last without a break to count as a collapse."""

    def __post_init__(self) -> None:
        for name, longer in (("hop_s", "block_s"), ("min_lag_s", "max_lag_s")):
            holds = getattr(self, name) <= getattr(self, longer)
            require(self, name, holds, f"at most {longer}={getattr(self, longer)}")


@dataclass(frozen=True, slots=True, eq=False)
class Appearance:
    """The tokens of a video, and the measurements of each frame."""

    tokens: Ints
    """Tokens of the frames, [N, r, c]."""
    sharpness: Floats
    """Sharpness of each frame in grey levels, [N]; see `sharpness`."""
    change: Floats
    """`picture_change` between each frame and the frame before, [N].

    The first frame has the value of the second.
    """
    moving: Mask
    """Whether the action that leads to each frame says that the car moves, [N]."""
    recorded_sharpness: Floats | None = None
    """Sharpness of the recorded frames, before the tokenizer, [N]; None without a video."""

    @classmethod
    def measure(cls, tokens: Ints, chunks: Iterable[Pixels], moving: Mask | None = None) -> Self:
        """Measure a video from its tokens and its decoded frames.

        The frames arrive in `chunks` [n, H, W, 3]. If `moving` is None, the car is assumed to move
        all the time.
        """
        sharpnesses, changes = [], []
        last: list[Pixels] = []
        for chunk in chunks:
            sharpnesses.append(sharpness(chunk))
            changes.append(picture_change(np.concatenate([*last, chunk])))
            last = [chunk[-1:]]
        change = np.concatenate(changes).astype(np.float64)
        moving = np.ones(len(tokens), np.bool_) if moving is None else moving
        change = np.concatenate([change[:1], change])
        return cls(tokens, np.concatenate(sharpnesses), change, moving)


def sharpness(frames: Iterable[Pixels]) -> Floats:
    """Return the standard deviation of the Laplacian [N], in grey levels, of frames [H, W, 3].

    Blur lowers this value. Hard edges and noise raise it. Its square is the focus measure of
    Pech-Pacheco et al. 2000 (https://doi.org/10.1109/ICPR.2000.903548).
    """
    spreads = []
    for frame in frames:
        grey = frame.mean(axis=2, dtype=np.float32)
        neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
        spreads.append((neighbours - 4 * grey[1:-1, 1:-1]).std())
    return np.array(spreads, np.float64)


def jensen_shannon(counts: NDArray[Any], others: NDArray[Any]) -> float:
    """Return the Jensen-Shannon divergence of two histograms [K], in bits, from 0 to 1.

    Lin 1991 (https://doi.org/10.1109/18.61115).
    """
    p, q = counts / counts.sum(), others / others.sum()
    return max(0.0, _entropy_bits((p + q) / 2) - (_entropy_bits(p) + _entropy_bits(q)) / 2)


def _entropy_bits(p: Floats) -> float:
    return -float(p[p > 0] @ np.log2(p[p > 0]))


def token_drift(tokens: Ints, real_counts: NDArray[Any], block: int, hop: int) -> Floats:
    """Return the divergence, in bits [B], of blocks of tokens [N, r, c] from a real histogram [K].

    Block b consists of frames [b·hop, b·hop + block). Compare the result with `drift_floor`: real
    blocks also differ from the histogram of all the footage, because a block shows only one stretch
    of road.
    """
    codes = max(len(real_counts), int(tokens.max()) + 1)
    real = np.pad(real_counts, (0, codes - len(real_counts)))
    histograms = _histograms(tokens, block, hop, codes)
    return np.array([jensen_shannon(histogram, real) for histogram in histograms])


def drift_floor(drives: Sequence[Ints], block: int, hop: int) -> Floats:
    """Return the divergence, in bits [B], of each real block from all other real frames."""
    codes = max(int(tokens.max()) for tokens in drives) + 1
    total = np.sum([np.bincount(tokens.ravel(), minlength=codes) for tokens in drives], axis=0)
    histograms = [
        histogram for tokens in drives for histogram in _histograms(tokens, block, hop, codes)
    ]
    return np.array([jensen_shannon(histogram, total - histogram) for histogram in histograms])


def _histograms(tokens: Ints, block: int, hop: int, codes: int) -> list[Ints]:
    starts = range(0, len(tokens) - block + 1, hop)
    return [np.bincount(tokens[at : at + block].ravel(), minlength=codes) for at in starts]


def agreement(tokens: Ints, lag: int) -> Floats:
    """Return the share of tokens, [N - lag], in which a frame equals the frame `lag` before it."""
    return np.asarray((tokens[lag:] == tokens[:-lag]).mean(axis=(1, 2)))


def repetition(footage: Appearance, frozen: Mask, lags: range, window: int) -> Floats:
    """Return a score [N], from 0 to 1: how well each frame repeats an earlier part of the video.

    1. For each lag in `lags`, compute the `agreement` of each frame with the frame one lag earlier.
    2. Take each window of `window` frames in a row. Its score at a lag is the lowest agreement of
       its frames, because all of them must repeat. Keep its best score over all lags.
    3. Set the score to 0 if the car should stand at some time in the window, or if at least half of
       its frames are frozen.
    4. Several windows contain the same frame. The frame gets the best of their scores.
    """
    window = min(window, len(footage.tokens))
    drives: Mask = np.asarray(sliding_window_view(footage.moving, window).all(axis=1))
    mostly_live = sliding_window_view(~frozen, window).mean(axis=1) > 0.5
    best = np.zeros(len(drives))
    for lag in range(lags.start, min(lags.stop, len(best))):
        least = sliding_window_view(agreement(footage.tokens, lag), window).min(axis=1)
        np.maximum(best[lag:], least, out=best[lag:])
    return _highest_around(best * (drives & mostly_live), window)


def continuity(tokens: Ints) -> Floats:
    """Return the share of each frame's tokens that are the same as in the frame before, [N].

    The first frame gets the value of the second, so at least two frames are needed.
    """
    kept = agreement(tokens, 1)
    return np.concatenate([kept[:1], kept])


def _means(curve: Floats, window: int) -> Floats:
    """Return the moving average, [N - window + 1], of a curve [N].

    If the curve is shorter than the window, return the mean of the curve, [1].
    """
    return np.asarray(sliding_window_view(curve, min(window, len(curve))).mean(axis=1))


def _highest_around(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Return, for each frame [N], the highest value of the windows that contain the frame.

    `values` [N - window + 1] has one value for each window.
    """
    return np.asarray(sliding_window_view(np.pad(values, window - 1), window).max(axis=1))


Judged = tuple[dict[str, Any], Mask]
"""Measurements for one kind of fault, as JSON, and a mask [N] of the frames with that fault."""


class RealFootage:
    """Real drives, encoded and decoded by the tokenizer, which set the bounds for faults."""

    def __init__(self, drives: Sequence[Appearance], fps: float, config: StabilityConfig) -> None:
        """Keep the real drives that are at least as long as a block.

        Ideally, these last a few minutes in all. Raises TooLittleDataError if they are together
        shorter than two blocks, or if the car never moves in them.
        """
        self.fps, self.config = fps, config
        names = ("block_s", "hop_s", "hold_s", "loop_s", "min_lag_s", "max_lag_s")
        frames = (max(1, round(getattr(config, name) * fps)) for name in names)
        block, self.hop, self.hold, self.loop, shortest, longest = frames
        self.block = max(2, block)
        self.lags = range(shortest, longest + 1)
        """Lags, in frames, at which a repeated picture counts as a loop."""
        self.drives = [drive for drive in drives if len(drive.tokens) >= self.block]
        count = sum(len(drive.tokens) for drive in self.drives)
        if count < 2 * self.block:
            raise TooLittleDataError(
                f"{count / fps:.1f} s of real drives is too little to compare a rollout with; name "
                f"drives of at least {self.block / fps:.1f} s each, and at least "
                f"{2 * self.block / fps:.1f} s together"
            )
        if not any(drive.moving.any() for drive in self.drives):
            raise TooLittleDataError(
                "the car never moves in the real drives; name drives in which it moves"
            )

    def judge(self, footage: Appearance) -> dict[str, Any]:
        """Compare a rollout with the real footage; return JSON, with curves over time as lists.

        `collapse_s` is the time at which the rollout collapses, or None if it does not.
        `collapsed_by` lists the faults that cause the collapse. `fault_shares` is the share of
        frames with each fault. Raises TooLittleDataError if the rollout is shorter than a block.
        """
        faults: dict[str, Mask] = {}
        drift, faults["drift"] = self._drift(footage)
        sharp, faults["sharpness"] = self._sharpness(footage)
        freeze, faults["frozen"] = self._freeze(footage)
        kept, faults["restless"] = self._continuity(footage)
        loops, faults["loop"] = self._loops(footage, faults["frozen"])
        collapse_s, collapsed_by = time_to_collapse(faults, self.fps, self.hold)
        return {
            "fps": self.fps,
            "seconds": len(footage.tokens) / self.fps,
            "collapse_s": collapse_s,
            "collapsed_by": collapsed_by,
            "fault_shares": {name: float(fault.mean()) for name, fault in faults.items()},
            "drift": drift,
            "sharpness": sharp,
            "freeze": freeze,
            "loops": loops,
            "continuity": kept,
        }

    def _drift(self, footage: Appearance) -> Judged:
        """Measure the divergence of each block, and mark the frames of blocks above the bound."""
        count, tokens = len(footage.tokens), [drive.tokens for drive in self.drives]
        if count < self.block:
            raise TooLittleDataError(
                f"a rollout of {count / self.fps:.1f} s is too short to be judged; roll out "
                f"{self.config.block_s:g} s or more"
            )
        floor = drift_floor(tokens, self.block, self.hop)
        highest = float(floor.max())
        threshold = highest + self.config.drift_margin * (1 - highest)
        counts = np.bincount(np.concatenate([of_drive.ravel() for of_drive in tokens]))
        bits = token_drift(footage.tokens, counts, self.block, self.hop)
        ends = np.arange(len(bits)) * self.hop + self.block
        # Judge a frame by the first block that ends at this frame or after it. Except at the start
        # of a rollout, most of that block lies before the frame, so drift is detected late rather
        # than early.
        of_frame = np.searchsorted(ends, np.arange(1, count + 1)).clip(max=len(ends) - 1)
        judged = {
            "bits": _listed(bits),
            "time_s": _listed(ends / self.fps),
            "mean_bits": float(bits.mean()),
            "floor_bits": float(np.median(floor)),
            "highest_floor_bits": highest,
            "threshold_bits": threshold,
        }
        return judged, (bits > threshold)[of_frame]

    def _sharpness(self, footage: Appearance) -> Judged:
        """Measure sharpness relative to real frames, and mark the frames outside its bounds.

        The reference is the median of the recorded frames or, without videos, that of the
        reconstructions. The bounds always come from the reconstructions, so that the tokenizer's
        blur is no fault of a rollout.
        """
        levels = np.concatenate([drive.sharpness for drive in self.drives])
        reference, floor = float(np.median(levels)), None
        both = [
            (drive.recorded_sharpness, drive.sharpness)
            for drive in self.drives
            if drive.recorded_sharpness is not None
        ]
        if both:
            recorded, reconstructed = map(np.concatenate, zip(*both, strict=True))
            reference, floor = float(np.median(recorded)), float(np.median(reconstructed))
        soft, hard = np.quantile(levels, [_LOW, _HIGH]).tolist()
        factor = self.config.sharpness_factor
        low, high = soft / reference / factor, hard / reference * factor
        ratio = footage.sharpness / reference
        judged = {
            "ratio": _listed(ratio),
            "mean_ratio": float(ratio.mean()),
            "floor_ratio": None if floor is None else floor / reference,
            "reference": "reconstructed" if floor is None else "recorded",
            "reference_grey_levels": reference,
            "thresholds": {"low": low, "high": high},
        }
        return judged, (ratio < low) | (ratio > high)

    def _freeze(self, footage: Appearance) -> Judged:
        """Mark frozen frames, in which the picture hardly changes although the car should move."""
        changes = np.concatenate([drive.change[drive.moving] for drive in self.drives])
        threshold = float(np.quantile(changes, _LOW)) * self.config.freeze_factor
        frozen = footage.moving & (footage.change <= threshold)
        longest = max((stop - start for start, stop in _runs(frozen)), default=0)
        judged = {
            "change": _listed(footage.change),
            "share": float(frozen.sum() / max(1, footage.moving.sum())),
            "longest_s": longest / self.fps,
            "froze": longest >= self.hold,
            "threshold": threshold,
        }
        return judged, frozen

    def _continuity(self, footage: Appearance) -> Judged:
        """Mark restless frames: the mean continuity around them is below the bound."""
        curves = [_means(continuity(drive.tokens), self.hold) for drive in self.drives]
        lowest = min(float(curve.min()) for curve in curves)
        threshold = lowest * self.config.restless_factor
        kept = continuity(footage.tokens)
        below = _means(kept, self.hold) < threshold
        low = _highest_around(below, min(self.hold, len(kept)))
        judged = {
            "kept": _listed(kept),
            "mean": float(kept.mean()),
            "real_lowest": lowest,
            "threshold": threshold,
        }
        # A window below the bound may also contain good frames. Do not mark these.
        return judged, low & (kept < lowest)

    def _loops(self, footage: Appearance, frozen: Mask) -> Judged:
        """Mark looping frames, whose repetition is above the bound."""
        highest = max(
            float(repetition(drive, np.zeros_like(drive.moving), self.lags, self.loop).max())
            for drive in self.drives
        )
        threshold = highest + self.config.loop_margin * (1 - highest)
        repeats = repetition(footage, frozen, self.lags, self.loop)
        looping = repeats > threshold
        period = loop_period(footage.tokens, looping, threshold, self.lags.stop - 1)
        judged = {
            "repetition": _listed(repeats),
            "found": bool(looping.any()),
            "period_s": None if period is None else period / self.fps,
            "first_s": float(looping.argmax()) / self.fps if looping.any() else None,
            "real_repetition": highest,
            "threshold": threshold,
        }
        return judged, looping


def loop_period(tokens: Ints, looping: Mask, threshold: float, longest: int) -> int | None:
    """Return the period of a loop: the number of frames, at most `longest`, until it repeats.

    Returns None if the picture never changes enough, or if it repeats at irregular intervals.
    """
    profile = np.zeros(min(longest, len(tokens) - 1))
    for lag in range(1, len(profile) + 1):
        if looping[lag:].any():
            profile[lag - 1] = agreement(tokens, lag)[looping[lag:]].mean()
    # After the shortest lags, the picture still looks the same because it has hardly changed. That
    # is no repetition, so ignore all lags before the first at which it has changed.
    changed = profile <= threshold
    profile[: changed.argmax() if changed.any() else len(profile)] = 0
    if profile.max(initial=0) <= threshold:
        return None
    return int((profile >= _NEARLY_HIGHEST * profile.max()).argmax()) + 1


def time_to_collapse(
    faults: Mapping[str, Mask], fps: float, hold: int
) -> tuple[float | None, list[str]]:
    """Return the time in s of the first collapse, and the names of the faults that cause it.

    Each fault is a mask [N] of frames. A collapse is a run of `hold` frames or more in which every
    frame has a fault. Its causes are the faults present in at least half of its first `hold`
    frames. If there is no collapse, return None and an empty list.
    """
    for start, stop in _runs(np.logical_or.reduce(list(faults.values()))):
        if stop - start >= hold:
            first = slice(start, start + hold)
            return start / fps, [name for name in faults if faults[name][first].mean() >= 0.5]
    return None, []


def _runs(mask: Mask) -> list[tuple[int, int]]:
    """Return the ranges [start, stop) in which a mask [N] is true."""
    edges = np.flatnonzero(np.diff(np.pad(mask, 1).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _listed(curve: Floats) -> list[float]:
    rounded: list[float] = curve.round(4).tolist()
    return rounded
