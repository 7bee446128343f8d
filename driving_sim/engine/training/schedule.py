"""Compute the position of a step in the run, and the learning rate there."""

import math

LONGEST_WARMUP_SHARE = 0.1
"""Longest warm-up, as a share of the run, so that short runs also reach the full learning rate."""


def position_by_steps(step: int, steps: int) -> float:
    """Return the position in the run: 0 at the first step, 1 at the last, above 1 after it."""
    return step / (steps - 1) if steps > 1 else float(2 * step)


def position_by_time(seconds: float, limit: float, step_seconds: float) -> float:
    """Return the position in the run: 0 at the start, 1 at the last step, above 1 after it.

    The last step is the last step that ends within `limit` seconds, if each step takes
    `step_seconds` (0 if unknown). So the run does not exceed its time limit even if steps are slow,
    and the learning rate still reaches the end of its schedule.
    """
    last_start = limit - step_seconds
    if last_start <= 0:
        return 0.0 if seconds == 0 else math.inf
    return seconds / last_start


def learning_rate_factor(step: int, position: float, *, warmup_steps: int, floor: float) -> float:
    """Return the factor on the peak learning rate: linear warm-up times a half cosine.

    The cosine falls from 1 to `floor` while `position` goes from 0 to 1.
    """
    by_steps = (step + 1) / max(warmup_steps, 1)
    warmup = min(1.0, max(by_steps, position / LONGEST_WARMUP_SHARE))
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(position, 1.0)))
    return warmup * (floor + (1.0 - floor) * cosine)
