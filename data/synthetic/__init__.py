"""The synthetic world: driving video with exact actions, and the true future of any action."""

from driving_sim.data.synthetic.drives import (
    SyntheticDrive,
    drive,
    frame_count,
    load_synthetic_drive,
)
from driving_sim.data.synthetic.motion.vehicle import VehicleState
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.data.synthetic.writer import world_seed, write_synthetic_drives

__all__ = [
    "SyntheticConfig",
    "SyntheticDrive",
    "SyntheticWorld",
    "VehicleState",
    "drive",
    "frame_count",
    "load_synthetic_drive",
    "world_seed",
    "write_synthetic_drives",
]
