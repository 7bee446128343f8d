"""How long a rollout remains a drive: drift, blur, freezes, loops, noise, and when it collapses.

There is no ideal to compare with. Every bound follows from what real footage of the same kind,
brought through the same tokenizer, shows of itself.

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
# The least of its highest agreement at which a later lag can already be the period: a loop of
# 3 s agrees as well after 6 s and 9 s, but for the sampling's noise.
_NEARLY_HIGHEST = 0.9


@config
class StabilityConfig:
    """Where a rollout counts as no longer a drive."""

    block_s: Positive = 5.0
    """Length of the blocks whose token histograms are compared with real ones, in s."""
    hop_s: Positive = 1.0
    """Time from the end of a block to the end of the next, in s; at most `block_s`."""
    drift_margin: InnerShare = 0.2
    """Drifted: this share of the way from real blocks' highest divergence to 1 bit."""
    sharpness_factor: Positive = 1.5
    """Too soft or too hard: this many times beyond real frames' 1st and 99th percentile."""
    freeze_factor: InnerShare = 0.5
    """Frozen: at most this share of the change of real moving frames' 1st percentile."""
    restless_factor: Positive = 0.3
    """Restless: tokens stay from frame to frame, as a mean over `hold_s`, by less than this share
    of the least in real footage. Noise of the right histogram is neither drift nor blur."""
    min_lag_s: Positive = 2.0
    """Shortest time after which a picture that is there again is a loop, in s."""
    max_lag_s: Positive = 30.0
    """Longest one that is looked at, in s: a real car on a circuit comes round after that."""
    loop_s: Positive = 1.0
    """Time over which every frame must agree with its earlier one, in s."""
    loop_margin: InnerShare = 0.25
    """Looping: this share of the way from the highest such agreement in real footage to 1."""
    hold_s: Positive = 2.0
    """Time for which faults must last to be a collapse, in s."""

    def __post_init__(self) -> None:
        for name, longer in (("hop_s", "block_s"), ("min_lag_s", "max_lag_s")):
            holds = getattr(self, name) <= getattr(self, longer)
            require(self, name, holds, f"at most {longer}={getattr(self, longer)}")


@dataclass(frozen=True, slots=True, eq=False)
class Appearance:
    """What is judged of a video: its tokens, and two numbers a frame instead of its pixels."""

    tokens: Ints
    """[N, r, c]."""
    sharpness: Floats
    """[N] grey levels, see `sharpness`."""
    change: Floats
    """[N] `picture_change` from the frame before; the first frame's is the second's."""
    moving: Mask
    """[N] where the car drives, or is told to, on the way to the frame."""

    @classmethod
    def measure(cls, tokens: Ints, chunks: Iterable[Pixels], moving: Mask | None = None) -> Self:
        """Measure decoded frames that come in chunks [n, H, W, 3], N in all; moving by default."""
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


def sharpness(frames: Pixels) -> Floats:
    """Return the standard deviation of the Laplacian [N], in grey levels, of frames [N, H, W, 3].

    Its square is the focus measure of Pech-Pacheco et al. 2000
    (https://doi.org/10.1109/ICPR.2000.903548): blur lowers it, hard edges and noise raise it.
    """
    spreads = []
    for frame in frames:
        grey = frame.mean(axis=2, dtype=np.float32)
        neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
        spreads.append((neighbours - 4 * grey[1:-1, 1:-1]).std())
    return np.array(spreads, np.float64)


def jensen_shannon(counts: NDArray[Any], others: NDArray[Any]) -> float:
    """Return the Jensen-Shannon divergence in bits, 0 to 1, of two histograms [K].

    Lin 1991 (https://doi.org/10.1109/18.61115).
    """
    p, q = counts / counts.sum(), others / others.sum()
    return max(0.0, _entropy_bits((p + q) / 2) - (_entropy_bits(p) + _entropy_bits(q)) / 2)


def _entropy_bits(p: Floats) -> float:
    return -float(p[p > 0] @ np.log2(p[p > 0]))


def token_drift(tokens: Ints, real_counts: NDArray[Any], block: int, hop: int) -> Floats:
    """Return the divergence in bits [B] of blocks of tokens [N, r, c] from a real histogram [K].

    Block b holds frames [b·hop, b·hop + block). A few thousand tokens of one stretch of road
    are never distributed as all the others are: read it beside `drift_floor`.
    """
    codes = max(len(real_counts), int(tokens.max()) + 1)
    real = np.pad(real_counts, (0, codes - len(real_counts)))
    return np.array([jensen_shannon(each, real) for each in _histograms(tokens, block, hop, codes)])


def drift_floor(drives: Sequence[Ints], block: int, hop: int) -> Floats:
    """Return the divergence in bits [B] of each block of real drives from all the other frames."""
    codes = max(int(tokens.max()) for tokens in drives) + 1
    total = np.sum([np.bincount(tokens.ravel(), minlength=codes) for tokens in drives], axis=0)
    blocks = [each for tokens in drives for each in _histograms(tokens, block, hop, codes)]
    return np.array([jensen_shannon(each, total - each) for each in blocks])


def _histograms(tokens: Ints, block: int, hop: int, codes: int) -> list[Ints]:
    starts = range(0, len(tokens) - block + 1, hop)
    return [np.bincount(tokens[at : at + block].ravel(), minlength=codes) for at in starts]


def agreement(tokens: Ints, lag: int) -> Floats:
    """Return the share of tokens [N - lag] that each frame of [N, r, c] has from `lag` before."""
    return np.asarray((tokens[lag:] == tokens[:-lag]).mean(axis=(1, 2)))


def repetition(footage: Appearance, frozen: Mask, lags: range, window: int) -> Floats:
    """Return how well each frame [N], with its neighbours, repeats some earlier ones.

    That is the highest agreement, at one of the `lags`, that a whole window of frames around it
    keeps up: a stretch of a diagonal of the self-similarity matrix. Windows in which the car stands
    by command, or that are mostly frozen, count nothing.
    """
    window = min(window, len(footage.tokens))
    drives: Mask = np.asarray(sliding_window_view(footage.moving, window).all(axis=1))
    lives = sliding_window_view(~frozen, window).mean(axis=1) > 0.5
    best = np.zeros(len(drives))
    for lag in range(lags.start, min(lags.stop, len(best))):
        least = sliding_window_view(agreement(footage.tokens, lag), window).min(axis=1)
        np.maximum(best[lag:], least, out=best[lag:])
    return _around(best * (drives & lives), window)


def continuity(tokens: Ints) -> Floats:
    """Return the share of tokens [N] kept from the frame before; the first frame's is the second's.

    Takes two frames or more.
    """
    kept = agreement(tokens, 1)
    return np.concatenate([kept[:1], kept])


def _means(curve: Floats, window: int) -> Floats:
    """The mean [N - window + 1] in each window of a curve [N], or in all of a shorter one."""
    return np.asarray(sliding_window_view(curve, min(window, len(curve))).mean(axis=1))


def _around(values: NDArray[Any], window: int) -> NDArray[Any]:
    """The highest [N] of the windows [N - window + 1] that each frame lies in."""
    return np.asarray(sliding_window_view(np.pad(values, window - 1), window).max(axis=1))


Judged = tuple[dict[str, Any], Mask]
"""What is measured of a rollout, as JSON, and the frames [N] that have the fault."""


class RealFootage:
    """Real drives that went through the tokenizer, and the bounds for rollouts that follow."""

    def __init__(self, drives: Sequence[Appearance], fps: float, config: StabilityConfig) -> None:
        """Take drives, a few minutes in all; those shorter than a block play no part.

        Raises DriveSimError where less than two blocks are left or nothing in them moves.
        """
        self.fps, self.config = fps, config
        names = ("block_s", "hop_s", "hold_s", "loop_s", "min_lag_s", "max_lag_s")
        frames = (max(1, round(getattr(config, name) * fps)) for name in names)
        block, self.hop, self.hold, self.loop, shortest, longest = frames
        self.block = max(2, block)
        self.lags = range(shortest, longest + 1)
        """At these a picture must not be there again."""
        self.drives = [drive for drive in drives if len(drive.tokens) >= self.block]
        count = sum(len(drive.tokens) for drive in self.drives)
        if count < 2 * self.block:
            raise TooLittleDataError(
                f"{count / fps:.1f} s of real drives of {self.block / fps:.1f} s or longer are too "
                f"little to compare a rollout with: name {2 * self.block / fps:.1f} s of them or "
                "more"
            )
        if not any(drive.moving.any() for drive in self.drives):
            raise TooLittleDataError("the real car never moves: name drives in which it does")

    def judge(self, footage: Appearance) -> dict[str, Any]:
        """Measure a rollout beside real footage: JSON, with curves over time as lists.

        `collapse_s` is when the faults `collapsed_by` set in to stay, None where they never do;
        `fault_shares` says for how much of the rollout each fault holds. Raises DriveSimError where
        it is shorter than a block.
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
        """A block drifted whose divergence is above real blocks' highest and a margin."""
        count, tokens = len(footage.tokens), [drive.tokens for drive in self.drives]
        if count < self.block:
            raise TooLittleDataError(
                f"a rollout of {count / self.fps:.1f} s is too short to be judged: roll out "
                f"{self.config.block_s:g} s or more"
            )
        floor = drift_floor(tokens, self.block, self.hop)
        highest = float(floor.max())
        threshold = highest + self.config.drift_margin * (1 - highest)
        counts = np.bincount(np.concatenate([each.ravel() for each in tokens]))
        bits = token_drift(footage.tokens, counts, self.block, self.hop)
        ends = np.arange(len(bits)) * self.hop + self.block
        # A frame goes by the block that ends with it, so that drift is noticed late, never early.
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
        """A frame is too soft or too hard as a multiple of the real median."""
        levels = np.concatenate([drive.sharpness for drive in self.drives])
        soft, median, hard = np.quantile(levels, [_LOW, 0.5, _HIGH]).tolist()
        factor = self.config.sharpness_factor
        low, high = soft / median / factor, hard / median * factor
        ratio = footage.sharpness / median
        judged = {
            "ratio": _listed(ratio),
            "mean_ratio": float(ratio.mean()),
            "real_grey_levels": median,
            "thresholds": {"low": low, "high": high},
        }
        return judged, (ratio < low) | (ratio > high)

    def _freeze(self, footage: Appearance) -> Judged:
        """A frame is frozen whose picture changes too little although the car moves."""
        changes = np.concatenate([drive.change[drive.moving] for drive in self.drives])
        threshold = float(np.quantile(changes, _LOW)) * self.config.freeze_factor
        frozen = footage.moving & (footage.change <= threshold)
        longest = max((stop - start for start, stop in _runs(frozen)), default=0)
        judged = {
            "change": _listed(footage.change),
            "share": float(frozen.sum() / max(1, footage.moving.sum())),
            "longest_s": longest / self.fps,
            "threshold": threshold,
        }
        return judged, frozen

    def _continuity(self, footage: Appearance) -> Judged:
        """Frames are restless whose mean continuity is too low."""
        curves = [_means(continuity(drive.tokens), self.hold) for drive in self.drives]
        lowest = min(float(curve.min()) for curve in curves)
        threshold = lowest * self.config.restless_factor
        kept = continuity(footage.tokens)
        low = _around(_means(kept, self.hold) < threshold, min(self.hold, len(kept)))
        judged = {
            "kept": _listed(kept),
            "mean": float(kept.mean()),
            "real_lowest": lowest,
            "threshold": threshold,
        }
        # Windows reach over the edge into frames that are as they should be.
        return judged, low & (kept < lowest)

    def _loops(self, footage: Appearance, frozen: Mask) -> Judged:
        """A frame is part of a loop whose repetition is above the highest real one and a margin."""
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
    """Return the lag in frames, at most `longest`, after which looping frames are there again.

    None where the picture never went away but hovers about one place, or comes back after times
    that are all different.
    """
    profile = np.zeros(min(longest, len(tokens) - 1))
    for lag in range(1, len(profile) + 1):
        if looping[lag:].any():
            profile[lag - 1] = agreement(tokens, lag)[looping[lag:]].mean()
    gone = profile <= threshold
    profile[: gone.argmax() if gone.any() else len(profile)] = 0
    if profile.max(initial=0) <= threshold:
        return None
    return int((profile >= _NEARLY_HIGHEST * profile.max()).argmax()) + 1


def time_to_collapse(
    faults: Mapping[str, Mask], fps: float, hold: int
) -> tuple[float | None, list[str]]:
    """Return when, in s, faults [N] set in for `hold` frames or more, and which; None where never.

    A fault takes part that holds for at least half of the first `hold`.
    """
    for start, stop in _runs(np.logical_or.reduce(list(faults.values()))):
        if stop - start >= hold:
            first = slice(start, start + hold)
            return start / fps, [name for name in faults if faults[name][first].mean() >= 0.5]
    return None, []


def _runs(mask: Mask) -> list[tuple[int, int]]:
    """The ranges [start, stop) in which a mask [N] holds."""
    edges = np.flatnonzero(np.diff(np.pad(mask, 1).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _listed(curve: Floats) -> list[float]:
    rounded: list[float] = curve.round(4).tolist()
    return rounded


def mean_stability(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up what `judge` found in one or more rollouts; those that never collapse last whole."""

    def mean(*path: str) -> float:
        values: Any = rollouts
        for key in path:
            values = [value[key] for value in values]
        return float(np.mean(values))

    collapses = [(each["collapse_s"], each["seconds"]) for each in rollouts]
    lasted = [seconds if at is None else at for at, seconds in collapses]
    return {
        "rollouts": len(rollouts),
        "seconds": mean("seconds"),
        "collapsed": sum(at is not None for at, _ in collapses),
        "mean_lasted_s": float(np.mean(lasted)),
        "drift_bits": mean("drift", "mean_bits"),
        "drift_floor_bits": rollouts[0]["drift"]["floor_bits"],
        "sharpness_ratio": mean("sharpness", "mean_ratio"),
        "frozen_share": mean("freeze", "share"),
        "longest_freeze_s": max(each["freeze"]["longest_s"] for each in rollouts),
        "looped": sum(each["loops"]["found"] for each in rollouts),
        "fault_shares": {name: mean("fault_shares", name) for name in rollouts[0]["fault_shares"]},
    }
