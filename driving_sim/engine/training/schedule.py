"""Where a run stands between its first step and its last, and the learning rate there."""

import math

SHORTEST_WARMUP_SHARE = 0.1
"""Warm-up ends after this share of a run at the latest, so that short runs leave it too."""


def position_by_steps(step: int, steps: int) -> float:
    """0 at the first step, 1 at the last one, more once the run is over."""
    return step / (steps - 1) if steps > 1 else float(2 * step)


def position_by_time(seconds: float, limit: float, step_seconds: float) -> float:
    """0 at the start, 1 for the last step that still ends in time, more once the run is over.

    `step_seconds` is what a step takes now (0 where nothing is known yet): a run of slow steps
    stops before the one that would end late, and its last step still sees the schedule's end.
    """
    last_start = limit - step_seconds
    if last_start <= 0:
        return 0.0 if seconds == 0 else math.inf
    return seconds / last_start


def learning_rate_factor(step: int, position: float, *, warmup_steps: int, floor: float) -> float:
    """Linear warm-up times a half cosine that falls from 1 to `floor` as position goes 0 to 1."""
    by_steps = (step + 1) / max(warmup_steps, 1)
    warmup = min(1.0, max(by_steps, position / SHORTEST_WARMUP_SHARE))
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(position, 1.0)))
    return warmup * (floor + (1.0 - floor) * cosine)
