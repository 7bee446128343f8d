"""A run folder of a tiny world model with two contexts of its own."""

from dataclasses import replace
from pathlib import Path

import pytest

from driving_sim.data.synthetic.contexts import write_contexts
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.world_model import WorldModel
from driving_sim.world_model.transformer import TokenGrid
from tests.fixtures.synthetic_worlds import SMALL
from tests.fixtures.token_drives import COLS, FPS, LEVELS, ROWS, tiny_tokenizer
from tests.fixtures.world_models import WIDE, random_model

CONFIG = replace(SMALL, fps=FPS, height=16 * ROWS, width=16 * COLS)


@pytest.fixture(scope="session")
def drives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the videos of two synthetic drives of 4 s."""
    folder = tmp_path_factory.mktemp("drives")
    return write_synthetic_drives(folder / "drives", drives=2, seconds=4.0, config=CONFIG)


@pytest.fixture(scope="session")
def run(drives: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "town"
    transformer = random_model(WIDE, TokenGrid(rows=ROWS, cols=COLS, levels=LEVELS))
    WorldModel(transformer, tiny_tokenizer(), fps=FPS, steering_kind="road_wheel").save(run)
    moments = {
        name: (video.with_suffix(".json"), 2.0) for name, video in zip("ab", drives, strict=True)
    }
    write_contexts(run / "contexts", moments, seconds=1.5)
    return run


@pytest.fixture(scope="session")
def world(run: Path) -> WorldModel:
    return WorldModel.from_run(run, "cpu", "fp32")
