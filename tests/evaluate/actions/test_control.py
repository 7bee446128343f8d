from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.sources import find_drives
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.actions.control import measure_control, obeyed
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.sampling.draw_waves import FrameSample
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import Prefix
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import FPS
from tests.fixtures.video_files import smooth_noise
from tests.fixtures.world_models import new_world


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


def test_control_judges_both_ways_from_every_start(
    world: WorldModel, videos: Path, tmp_path: Path
) -> None:
    drives, sheet = find_drives([videos]).drives, tmp_path / "control.png"
    result = measure_control(world, drives, starts=3, seconds=0.5, sampling=Sampling(), sheet=sheet)
    with Image.open(sheet) as picture:
        # The sheet has five columns and three rows of frames with an aspect ratio of 2:1.
        assert picture.height > 3 * picture.width / 5 / 2
    trials = [trial for of_drive in result["trials"].values() for trial in of_drive]
    assert len(trials) == 3
    assert [len(of_drive) for of_drive in result["trials"].values()] == [2, 1]
    first, second = (trial["start_s"] for trial in trials[:2])
    assert second > first


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (0.02, -0.01, True),
        (-0.02, 0.01, False),
        (0.02, 0.01, False),  # both turn left
        (-0.01, -0.02, False),
        (0.02, 0.0, False),
        (0.0, -0.02, False),
        (0.0, 0.0, False),
    ],
)
def test_a_trial_is_obeyed_if_left_turns_left_and_right_turns_right(
    left: float, right: float, expected: bool
) -> None:
    assert obeyed(left, right) is expected


@pytest.mark.parametrize(("turns", "count"), [(1, 2), (0, 0), (-1, 0)])
def test_control_tells_obedience_from_its_opposite(
    world: WorldModel, videos: Path, monkeypatch: pytest.MonkeyPatch, turns: int, count: int
) -> None:
    """Fake a model; with `turns=1` it moves the scene right when steered left, as it should."""
    scene = smooth_noise(np.random.default_rng(0), 48, 64)[..., None].repeat(3, axis=-1)

    def generate(
        prefix: Prefix, actions: Any, valid: Any, *, sampling: Sampling
    ) -> Iterator[FrameSample]:
        assert valid.all()
        assert (actions[0, :, SPEED] == actions[1, :, SPEED]).all()
        np.testing.assert_allclose(np.abs(actions[..., STEERING]), world.statistics.steering_p99)
        for steering in actions[..., STEERING].T:
            tokens = torch.from_numpy(1 + np.sign(steering)).long()[:, None, None]
            yield FrameSample(tokens, *[tokens.float()] * 3)

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        shifts = np.cumsum(tokens.numpy().flatten() - 1) * 2 * turns
        frames = [np.roll(scene, int(shift), axis=1) for shift in shifts]
        return torch.from_numpy(np.stack(frames).astype(np.uint8))

    monkeypatch.setattr(world, "generate", generate)
    monkeypatch.setattr(world.tokenizer, "decode", decode)
    drives = find_drives([videos]).drives
    result = measure_control(world, drives, starts=2, seconds=2, sampling=Sampling())
    assert result["obeyed"] == count
    assert np.sign(result["mean_left_minus_right"]) == turns


def test_control_that_cannot_be_measured_is_refused(world: WorldModel, videos: Path) -> None:
    drives = find_drives([videos]).drives
    with pytest.raises(DriveSimError, match=r"`sheet` a\.txt: not the name of a picture"):
        measure_control(world, drives, sampling=Sampling(), sheet=Path("a.txt"))
    for seconds in (0.0, float("nan"), float("inf")):
        with pytest.raises(DriveSimError, match=f"`seconds` {seconds:g}"):
            measure_control(world, drives, seconds=seconds, sampling=Sampling())
    model = Transformer(world.config.model, world.config.grid, ActionStatistics())
    still = WorldModel(model, world.tokenizer, fps=FPS, steering_kind=None)
    with pytest.raises(DriveSimError, match="no steering"):
        measure_control(still, drives, sampling=Sampling())
