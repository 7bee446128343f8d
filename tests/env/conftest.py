from typing import Any

import numpy as np
import pytest

from driving_sim.env import DriveEnv, Moment
from driving_sim.world_model import WorldModel
from tests.town import drives, run, world

__all__ = ["drives", "run", "world"]


def zero(moment: Moment) -> np.ndarray:
    return np.zeros(len(moment.time_s))


@pytest.fixture
def settings(world: WorldModel) -> dict[str, Any]:
    """Return settings of environments whose reward costs nothing to compute."""
    return {"model": world, "reward": zero}


@pytest.fixture
def env(settings: dict[str, Any]) -> DriveEnv:
    return DriveEnv(**settings)
