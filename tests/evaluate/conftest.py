from pathlib import Path

import pytest

from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from tests.fixtures.token_drives import FPS


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    config = SyntheticConfig(height=48, width=64, fps=FPS)
    write_synthetic_drives(folder, drives=2, seconds=6, config=config)
    return folder
