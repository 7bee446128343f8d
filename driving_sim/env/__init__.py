"""Gymnasium environments in which an agent drives in a world model.

Importing this package registers `drivesim/Drive-v0`. It needs `pip install 'drivesim[env]'`.
"""

from driving_sim.engine.errors import MissingExtraError

try:
    import gymnasium
    import gymnasium.vector

    _ = gymnasium.vector.AutoresetMode  # new in gymnasium 1.1
except (ImportError, AttributeError) as error:
    raise MissingExtraError(
        "driving_sim.env needs gymnasium 1.1 or newer; install it with "
        "`pip install 'drivesim[env]'`"
    ) from error

from driving_sim.env.drive_env import DriveEnv
from driving_sim.env.drive_vector_env import DriveVectorEnv
from driving_sim.env.lane_probe import LaneProbe, train_lane_probe
from driving_sim.env.moment import Moment
from driving_sim.env.rewards import KeepLane, ProgressWithoutSurprise, never

__all__ = [
    "DriveEnv",
    "DriveVectorEnv",
    "KeepLane",
    "LaneProbe",
    "Moment",
    "ProgressWithoutSurprise",
    "never",
    "train_lane_probe",
]

ENV_ID = "drivesim/Drive-v0"
"""Name under which `gymnasium.make` and `gymnasium.make_vec` know the environments."""
MAX_EPISODE_STEPS = 300
"""Steps after which `gymnasium.make` and `gymnasium.make_vec` truncate an episode by default."""

if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        ENV_ID,
        entry_point="driving_sim.env.drive_env:DriveEnv",
        vector_entry_point="driving_sim.env.drive_vector_env:DriveVectorEnv",
        max_episode_steps=MAX_EPISODE_STEPS,
    )
