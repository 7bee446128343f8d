from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic import SyntheticConfig, write_synthetic_drives
from driving_sim.evaluate.flicker import flicker
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


def test_means_are_those_of_all_frames(world: WorldModel, videos: Path) -> None:
    drives = [sample(drive) for drive in find_drives([videos]).drives]
    both = evaluate_tokenizer(world.tokenizer, drives).metrics
    apart = [evaluate_tokenizer(world.tokenizer, [drive]).metrics for drive in drives]
    assert both["frames"] == sum(each["frames"] for each in apart)
    assert both["psnr_db"]["mean"] == pytest.approx(
        np.mean([each["psnr_db"]["mean"] for each in apart])
    )
    frames = drives[0].drive.frames(drives[0].indices)
    tokens = world.tokenizer.encode(frames)
    rebuilt = world.tokenizer.decode(tokens).numpy()
    errors = np.square(rebuilt.astype(float) - frames).mean(axis=(1, 2, 3))
    expected = (10 * np.log10(255**2 / errors)).mean()
    assert apart[0]["psnr_db"]["mean"] == pytest.approx(expected, abs=1e-3)
    assert both["drives"][drives[0].drive.id]["psnr_db"] == pytest.approx(expected, abs=1e-3)
    # In batches as in one piece: no pair of frames is lost between two of them.
    whole = flicker(tokens.numpy(), frames)
    assert whole.cells == 12 * (len(frames) - 1)
    assert apart[0]["flicker"] == whole.shares()


def test_what_a_frame_costs_is_its_tokens_and_codes(world: WorldModel, videos: Path) -> None:
    found = evaluate_tokenizer(world.tokenizer, [sample(find_drives([videos]).drives[0])]).metrics
    assert found["bits_per_frame"] == pytest.approx(12 * np.log2(9))
    assert found["compression_factor"] == pytest.approx(48 * 64 * 24 / (12 * np.log2(9)))


def test_the_worst_frames_are_shown(world: WorldModel, videos: Path) -> None:
    section = evaluate_tokenizer(
        world.tokenizer, [sample(drive) for drive in find_drives([videos]).drives]
    )
    shown = [float(part.caption.split(": ")[1].split(" dB")[0]) for part in section.parts[2:]]
    assert len(shown) == 6
    assert shown == sorted(shown)
    assert shown[0] < section.metrics["psnr_db"]["mean"]
