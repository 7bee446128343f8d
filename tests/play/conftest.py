from pathlib import Path

import pytest

from driving_sim.play.drive import Drive
from driving_sim.play.starts import Start, find_starts
from driving_sim.world_model import WorldModel
from tests.town import drives, run, world

__all__ = ["drives", "run", "world"]


@pytest.fixture(scope="session")
def starts(world: WorldModel) -> dict[str, Start]:
    return find_starts(world, None, Path("missing"))


@pytest.fixture
def drive(world: WorldModel, starts: dict[str, Start]) -> Drive:
    return Drive(world, "town", starts)
