"""Predict from the actions how far a car turns from one frame to the next.

Legend: T frames, P = T - 1 pairs of frames.
"""

from collections.abc import Iterator

import numpy as np

from driving_sim.data.actions.action_log import SPEED, STEERING, SteeringKind
from driving_sim.data.arrays import Floats, Mask
from driving_sim.data.drive import Drive, SampledDrive

USUAL_WHEELBASE_M = 2.7
"""Distance between the axles of a passenger car."""
# Divide a steering value by this ratio to get the angle of the front wheels in rad.
_STEERING_RATIOS = {"road_wheel": 1.0, "steering_wheel": 15.0, "normalised": 2.0}
_RATIOS_IN_WORDS = {
    "steering_wheel": f"a steering ratio of {_STEERING_RATIOS['steering_wheel']:g}",
    "normalised": f"{1 / _STEERING_RATIOS['normalised']:g} rad at full lock",
}


def curvature(steering: Floats, kind: SteeringKind, wheelbase_m: float | None) -> Floats:
    """Convert steering to the curvature in 1/m of the path of a car with this wheelbase."""
    if kind == "curvature":
        return steering
    return np.tan(steering / _STEERING_RATIOS[kind]) / (wheelbase_m or USUAL_WHEELBASE_M)


def assumptions(drive: Drive) -> Iterator[str]:
    """Yield a line that says which car `predicted_turns` assumes, if it assumes one."""
    kind = drive.log.steering_kind if drive.log else None
    if kind is None or kind == "curvature":
        return
    axles = "" if drive.wheelbase_m else f"a wheelbase of {USUAL_WHEELBASE_M} m (`wheelbase`)"
    if assumed := " and ".join(filter(None, (axles, _RATIOS_IN_WORDS.get(kind)))):
        yield f"the check of the units assumes a car with {assumed}"


def predicted_turns(sampled: SampledDrive, kind: SteeringKind) -> tuple[Floats, Mask]:
    """Return the change of heading [P] that the actions predict, and where it is known [P].

    The change is in rad. If the drive has no known speed, it is the change at 1 m/s instead.
    """
    actions, valid = sampled.actions[:-1].astype(np.float64), sampled.action_valid[:-1]
    path = curvature(actions[:, STEERING], kind, sampled.drive.wheelbase_m)
    turns = path * np.diff(sampled.timestamps)
    known = valid[:, STEERING]
    if sampled.action_valid[:, SPEED].any():
        return turns * actions[:, SPEED], known & valid[:, SPEED]
    return turns, known
