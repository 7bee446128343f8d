"""The packaged world model: complete, small, and driven from its own contexts."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from safetensors import safe_open

from driving_sim.data.synthetic.true_future import load_synthetic_drive, replay
from driving_sim.engine.config import load_json
from driving_sim.engine.run_folder import find_run, packaged_models
from driving_sim.env import KeepLane
from driving_sim.pipeline import roll_out
from driving_sim.tokenizer.metrics import psnr
from driving_sim.world_model import WorldModel
from driving_sim.world_model.contexts import contexts_of, load_context

FOLDER = find_run("synthetic")
CONTEXTS = ["autumn", "evening", "noon", "overcast", "standing", "traffic"]


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return WorldModel.from_run("synthetic", "cpu")


def test_it_is_small_and_in_bf16(world: WorldModel) -> None:
    assert packaged_models() == ["synthetic"]
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    for path in (FOLDER / "model.safetensors", FOLDER / "tokenizer" / "model.safetensors"):
        with safe_open(path, "pt") as file:
            formats = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert "BF16" in formats
        assert "F32" not in formats
    assert sum(value.numel() for value in world.transformer.parameters()) < 5e6
    assert (world.tokenizer.height, world.tokenizer.width, world.fps) == (128, 256, 10)
    assert world.fingerprint in (FOLDER / "card.md").read_text("utf-8")


def test_the_card_is_filled_in() -> None:
    card = (FOLDER / "card.md").read_text("utf-8")
    for word in ("Data", "Recipe", "commit", "Licence", "Protocol", "Limits", "steering gain"):
        assert word in card
    assert "{" not in card


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_has_the_state_of_the_world(world: WorldModel, name: str) -> None:
    assert list(contexts_of("synthetic")) == CONTEXTS
    video = contexts_of("synthetic")[name]
    driven = load_synthetic_drive(video.with_suffix(".json"))
    context = load_context(world, video)
    assert len(driven.states) == 31
    last = torch.from_numpy(driven.world.render(driven.states[-1])[None])
    assert psnr(torch.from_numpy(context.frames[-1:]), last) > 30
    # Standing still, the true future is the last frame, but for the traffic.
    future = replay(driven.world, driven.states[-1], np.zeros((2, 2), np.float32))
    assert psnr(torch.from_numpy(future[:1]), last) > 25


def test_left_and_right_turn_the_picture_opposite_ways(world: WorldModel) -> None:
    context = load_context(world, contexts_of("synthetic")["noon"])
    steering = world.statistics.steering_p95
    with world.drive(context, branches=2) as session:
        frames = [session.step([[8.0, steering], [8.0, -steering]]).pixels for _ in range(4)]
    start = context.frames[-1].mean(-1)[:50]  # the sky and the horizon, which only turning moves
    shifts = []
    for future in frames[-1].mean(-1)[:, :50]:
        errors = [
            np.abs(np.roll(future, -by, axis=1)[:, 64:-64] - start[:, 64:-64]).mean()
            for by in range(-60, 61)
        ]
        shifts.append(int(np.argmin(errors)) - 60)
    assert shifts[0] > 5  # to the left: the picture moves to the right
    assert shifts[1] < -5


def test_it_rolls_out_by_name(tmp_path: Path) -> None:
    report = roll_out("synthetic", "left", tmp_path / "left.mp4", seconds=0.5)
    assert report["context"]["drive"] == "autumn"
    assert report["frames"] == 5
    settings = load_json(tmp_path / "left.json")
    assert settings["fps"] == 10


def test_an_agent_drives_in_it() -> None:
    env = gymnasium.make("drivesim/Drive-v0", reward=KeepLane())
    observation, info = env.reset(seed=0)
    assert observation.shape == (128, 256, 3)
    assert info["context"] in CONTEXTS
    observation, reward, terminated, *_ = env.step(np.zeros(2, np.float32))
    assert (
        0 < float(reward) < 2
    )  # metres driven in a tenth of a second, near the middle of the lane
    assert not terminated
    env.close()
