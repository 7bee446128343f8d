"""Compute the position of a step in the run, and the learning rate there."""

import math

LONGEST_WARMUP_SHARE = 0.1
"""Longest warm-up, as a share of the run, so that short runs also reach the full learning rate."""


def position_by_steps(step: int, steps: int) -> float:
    """Return the position in the run: 0 at the first step, 1 at the last, above 1 after it."""
    return step / (steps - 1) if steps > 1 else float(2 * step)


def position_by_time(seconds: float, limit: float, step_seconds: float) -> float:
    """Return the position in the run after `seconds`: 0 at the start, above 1 when it is over.

    The run must end within `limit` seconds, even if steps are slow. So the position is 1 when the
    time left is just enough for one last step, which takes `step_seconds` (0 if unknown). The
    learning rate then reaches the end of its schedule in the last step.
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
