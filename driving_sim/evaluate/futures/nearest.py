"""Score rollouts against every true future of their start, and count which is the nearest.

Axes: S starts, K futures of a start, N frames of a future, H W pixels, B C pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from driving_sim.data.arrays import Floats, Pixels
from driving_sim.evaluate.report.intervals import interval
from driving_sim.tokenizer.metrics import psnr

Compare = Callable[[Tensor, Tensor], Tensor]
"""Function (frames uint8 [B, H, W, 3], others [C, H, W, 3]) -> a score for each pair [B, C]."""

Scores = dict[str, dict[str, dict[str, Floats]]]
"""Scores [K, K] of one start, by measure, window and source."""

PSNR, DISTANCE = "psnr_db", "feature_distance"
SOURCES = {
    "model": "model",
    "reconstructed": "truth after the tokenizer",
    "action_free": "model without actions",
}
"""What is compared with the true futures, with labels for people."""
EARLY, LATE = "early", "late"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Futures:
    """The futures of one start as frames. Rollout k was given the actions of true future k."""

    recorded: Pixels
    """The true futures, uint8 [K, N, H, W, 3]."""
    reconstructed: Pixels
    """The true futures after the tokenizer, uint8 [K, N, H, W, 3]."""
    model: Pixels
    """The rollouts, uint8 [K, N, H, W, 3]."""
    action_free: Pixels
    """One rollout under unknown actions, uint8 [N, H, W, 3]."""


def windows(fps: float, frames: int) -> dict[str, slice]:
    """Return the frames of a future that are judged: from 0.5 to 1.5 s, and the last second.

    Frame n is shown (n + 1) / `fps` seconds after the start.
    """
    return {
        EARLY: slice(round(0.5 * fps), round(1.5 * fps)),
        LATE: slice(frames - max(1, round(fps)), frames),
    }


def pairwise_psnr(frames: Tensor, others: Tensor) -> Tensor:
    """Return the PSNR in dB [B, C] of uint8 frames [B, H, W, 3] with others [C, H, W, 3]."""
    return torch.stack([psnr(frames, other.expand_as(frames)) for other in others], dim=1)


def score(futures: Futures, judged: Mapping[str, slice], distance: Compare | None) -> Scores:
    """Score the futures of one start in the frames that are `judged`, by the name of the window.

    Row k belongs to rollout k, column j to true future j. The score is a mean over the frames of
    the window. PSNR compares with the reconstructed futures, so the tokenizer's errors do not
    count. The feature distance compares with the recorded ones, so they do.
    """
    count = len(futures.model)
    compared = np.concatenate([futures.model, futures.reconstructed, futures.action_free[None]])
    measures: dict[str, tuple[Compare, Pixels]] = {PSNR: (pairwise_psnr, futures.reconstructed)}
    if distance is not None:
        measures[DISTANCE] = distance, futures.recorded
    scores: Scores = {}
    for measure, (compare, references) in measures.items():
        of_frame = {
            t: compare(torch.from_numpy(compared[:, t]), torch.from_numpy(references[:, t]))
            for t in sorted({t for window in judged.values() for t in _frames(window)})
        }
        for name, window in judged.items():
            mean = torch.stack([of_frame[t] for t in _frames(window)]).double().mean(0).numpy()
            model, reconstructed, action_free = np.split(mean, [count, 2 * count])
            of_all = np.broadcast_to(action_free, model.shape)
            scores.setdefault(measure, {})[name] = dict(
                zip(SOURCES, (model, reconstructed, of_all), strict=True)
            )
    return scores


def _frames(window: slice) -> range:
    return range(window.start, window.stop)


def judge(scores: Floats, names: Sequence[str], *, higher_is_nearer: bool) -> dict[str, Any]:
    """Judge the scores [S, K, K] of rollouts (rows) with the true futures (columns) of S starts.

    `nearest` is the share of rollouts that are nearer to their own future than to any other, and
    `nearest_count` their number. `pairs` is, for two futures, the share of their rollouts that are
    nearer to their own than to the other. Equally near counts as not nearer. `own` and `other` are
    the mean scores with the own and with all other futures, and `table` has all mean scores. All
    intervals resample the starts.
    """
    starts, count, _ = scores.shape
    own = scores.diagonal(axis1=1, axis2=2)
    is_self = np.eye(count, dtype=np.bool_)
    gap = own[:, :, None] - scores
    is_nearer = gap > 0 if higher_is_nearer else gap < 0
    nearest = (is_nearer | is_self).all(axis=2)
    of_start = np.repeat(np.arange(starts), count)
    return {
        "nearest": interval(nearest.ravel(), of_start),
        "nearest_count": int(nearest.sum()),
        "own": interval(own.ravel(), of_start),
        "other": interval(scores[:, ~is_self].mean(axis=1)),
        "pairs": {
            f"{names[a]}/{names[b]}": interval(
                np.stack([is_nearer[:, a, b], is_nearer[:, b, a]], axis=1).ravel(),
                np.repeat(np.arange(starts), 2),
            )
            for a, b in combinations(range(count), 2)
        },
        "table": {
            row: dict(zip(names, means, strict=True))
            for row, means in zip(names, scores.mean(axis=0).tolist(), strict=True)
        },
    }
