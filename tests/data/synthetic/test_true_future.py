import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from driving_sim.data.synthetic.drives import drive
from driving_sim.data.synthetic.true_future import (
    load_synthetic_drive,
    replay,
    synthetic_beside,
)
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.engine.errors import DriveSimError
from tests.fixtures.synthetic_worlds import SMALL, psnr


def four_futures(world: SyntheticWorld, seconds: float) -> dict[str, NDArray[np.uint8]]:
    """Return the true futures of four actions from one state: frames [N, H, W, 3] by name."""
    time = (np.arange(round(seconds * world.config.fps)) + 0.5) / world.config.fps
    actions = {
        "straight": (np.full_like(time, 10.0), 0.0),
        "left": (np.full_like(time, 10.0), 0.12),
        "right": (np.full_like(time, 10.0), -0.12),
        "brake": (np.maximum(10.0 - 4.0 * time, 0.0), 0.0),
    }
    start = world.reset(200.0)
    return {
        name: replay(
            world, start, np.stack([speed, np.full_like(time, steering)], 1).astype(np.float32)
        )
        for name, (speed, steering) in actions.items()
    }


def test_the_futures_of_the_four_actions_are_far_apart() -> None:
    for seed in (1, 2, 3):
        world = SyntheticWorld(seed, SyntheticConfig(height=64, width=128))
        futures = four_futures(world, 2.0)
        for a, b in itertools.combinations(futures, 2):
            apart = psnr(futures[a][-10:], futures[b][-10:])
            assert apart < 18, f"seed {seed}: {a} and {b} are within {apart:.1f} dB"
        for a, b in itertools.combinations(("straight", "left", "right"), 2):
            assert psnr(futures[a][9], futures[b][9]) < 18


def test_replaying_the_recorded_actions_gives_the_recorded_frames(tmp_path: Path) -> None:
    driven = drive(SyntheticWorld(11, SMALL), 3.0, 2)
    driven.save(tmp_path / "drive.json")
    loaded = load_synthetic_drive(tmp_path / "drive.json")
    assert loaded.states == driven.states
    np.testing.assert_array_equal(loaded.actions, driven.actions)
    for start in (0, 17):
        frames = replay(loaded.world, loaded.states[start], loaded.actions[start:])
        np.testing.assert_array_equal(frames[:-1], driven.frames[start + 1 :])
    np.testing.assert_allclose(driven.timestamps, np.arange(30) / 10)


def test_an_action_can_be_held_for_several_steps() -> None:
    world = SyntheticWorld(11, SMALL)
    actions = np.array([[8.0, 0.1], [6.0, -0.1]], np.float32)
    every = replay(world, world.reset(), actions.repeat(3, axis=0))
    np.testing.assert_array_equal(replay(world, world.reset(), actions, steps=3), every[2::3])


@pytest.mark.parametrize("text", ["{}", '{"format": "drivesim synthetic drive 0"}', "[1]", "!"])
def test_other_json_is_no_drive(tmp_path: Path, text: str) -> None:
    path = tmp_path / "drive.json"
    path.write_text(text)
    with pytest.raises(DriveSimError, match=r"drive\.json"):
        load_synthetic_drive(path)


def test_a_drive_is_found_beside_its_video(tmp_path: Path) -> None:
    video = tmp_path / "drive.mp4"
    assert synthetic_beside(video) is None
    video.with_suffix(".json").write_text('{"format": "another"}', "utf-8")
    assert synthetic_beside(video) is None
    driven = drive(SyntheticWorld(1, SMALL), 2.0, 3)
    driven.save(video.with_suffix(".json"))
    found = synthetic_beside(video)
    assert found is not None
    assert found.states == driven.states
