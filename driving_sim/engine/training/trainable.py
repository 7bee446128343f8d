"""What a validation hands to the training loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What one validation found."""

    score: float
    """What decides which weights are kept: lower is better."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name."""
    images: Mapping[str, Pixels] = field(default_factory=dict)
    """uint8 [H, W, 3] by name."""
    videos: Mapping[str, Pixels] = field(default_factory=dict)
    """uint8 [T, H, W, 3] by name."""
