"""Judge the units of speed and steering by the focal length that would explain the motion."""

import math
from typing import NamedTuple

from driving_sim.data.actions.action_log import SteeringKind
from driving_sim.data.inspect.turns import USUAL_WHEELBASE_M
from driving_sim.data.inspect.view import View

FOCAL_WIDTHS = (0.2, 3.0)
"""Shortest and longest plausible focal length, in picture widths."""

_MIN_CORRELATION = 0.6
# Normalised steering does not say how far the wheels turn. The least lock is this share of the one
# that is assumed.
_LEAST_LOCK = 0.5
# Normalised actions often come from model cars, and these differ in size by much.
_LEAST_WHEELBASE_M = 0.15
_USUAL_FOCAL_WIDTHS = 0.8


class Units(NamedTuple):
    """What the image motion says about the units of speed and steering."""

    problem: str | None = None
    """A message if a unit must be wrong."""
    notices: tuple[str, ...] = ()
    """What cannot be told about the units, and why, one line each."""


def judge_units(
    factor: float, correlation: float, kind: SteeringKind, wheelbase_m: float | None, view: View
) -> Units:
    """Judge the `factor` from turns in rad to image motion in picture widths.

    Noise in the motion makes `factor` too large, and noise in the turns makes it too small. The
    `correlation` says by how much at most.
    """
    low, high = FOCAL_WIDTHS
    wheelbase_m = wheelbase_m or USUAL_WHEELBASE_M
    least, most = factor * abs(correlation), factor / abs(correlation)
    if kind == "normalised":
        low *= _LEAST_LOCK
    if low <= most and least <= high:
        return Units()
    if abs(correlation) < _MIN_CORRELATION or view.hindrance:
        reason = view.hindrance or f"the correlation is only {abs(correlation):.2f}"
        return Units(notices=(f"the units of speed and steering cannot be checked: {reason}",))
    if kind == "normalised" and factor > high and factor * _LEAST_WHEELBASE_M <= high * wheelbase_m:
        fitting = wheelbase_m * _USUAL_FOCAL_WIDTHS / factor
        return Units(
            notices=(
                "speed and steering cannot be checked: they would fit a car with a wheelbase of "
                f"about {fitting:.1g} m; if it is one, set `wheelbase`",
            )
        )
    view_deg = math.degrees(2 * math.atan(0.5 / factor))
    more, wheelbase = "less" if factor < low else "more", ", and `wheelbase`"
    return Units(
        f"the picture turns far {more} than speed and steering predict (only a camera with a "
        f"field of view of {view_deg:.0f} degrees would show this): check their units, the kind of "
        f"steering{'' if kind == 'curvature' else wheelbase}"
    )
