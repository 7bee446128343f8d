"""Judge from the motion in the picture whether the camera sees well enough how the car turns."""

from dataclasses import dataclass

import numpy as np

from driving_sim.data.arrays import Mask
from driving_sim.data.inspect.motion import Motion

# Measured: cameras that look ahead have a distinctness above 0.12 and move downwards by less than
# 0.06 on average. A dark indoor course has a distinctness of 0.03. Views from above move downwards
# by more than 0.4.
_LEAST_DISTINCTNESS = 0.08
_MOST_DOWNWARD = 0.25
_STILL = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What hinders a camera from seeing how the car turns."""

    is_faint: bool = False
    """Whether the picture has too little texture to follow it from frame to frame."""
    is_from_above: bool = False
    """Whether the whole picture slides downwards or upwards while the car drives, because the
    camera looks at the ground."""

    @classmethod
    def judge(cls, motion: Motion, usable: Mask) -> "View":
        """Judge the view from the motion [P] where it is usable [P]."""
        moving = usable & (np.abs(motion.sideways) + np.abs(motion.downward) > _STILL)
        if not moving.any():
            return cls()
        is_faint = bool(np.median(motion.distinctness[moving]) < _LEAST_DISTINCTNESS)
        slides = bool(abs(motion.downward[moving].mean()) > _MOST_DOWNWARD)
        return cls(is_faint=is_faint, is_from_above=slides and not is_faint)

    @property
    def hindrance(self) -> str:
        """What hinders the camera, in words; empty if nothing does."""
        if self.is_from_above:
            return "the camera looks at the ground from above"
        return "the picture has too little texture" if self.is_faint else ""


CLEAR = View()
"""A camera that looks ahead and sees well."""
