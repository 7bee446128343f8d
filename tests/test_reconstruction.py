from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic import SyntheticConfig, write_synthetic_drives
from driving_sim.evaluate.reconstruction import evaluate_tokenizer
from driving_sim.world_model.world_model import WorldModel
from tests.test_world_model import new_world
from tests.token_drives import FPS


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    config = SyntheticConfig(height=48, width=64, fps=FPS)
    write_synthetic_drives(folder, drives=2, seconds=6, config=config)
    return folder


def test_tokenizer_means_are_those_of_all_frames(world: WorldModel, videos: Path) -> None:
    drives = [sample(drive) for drive in find_drives([videos]).drives]
    both = evaluate_tokenizer(world.tokenizer, drives)
    apart = [evaluate_tokenizer(world.tokenizer, [drive]) for drive in drives]
    assert both["frames"] == sum(each["frames"] for each in apart)
    assert both["psnr_db"] == pytest.approx(np.mean([each["psnr_db"] for each in apart]))
    frames = drives[0].drive.frames(drives[0].indices)
    rebuilt = world.tokenizer.decode(world.tokenizer.encode(frames)).numpy()
    errors = np.square(rebuilt.astype(float) - frames).mean(axis=(1, 2, 3))
    assert apart[0]["psnr_db"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), abs=1e-3)
