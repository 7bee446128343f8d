import gc
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
from gymnasium.utils.env_checker import check_env

from driving_sim.data.arrays import Pixels
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.engine import run_folder
from driving_sim.engine.errors import DriveSimError
from driving_sim.env import DriveEnv, Moment
from driving_sim.env.starts import find_starts
from driving_sim.world_model import WorldModel
from driving_sim.world_model.cache import RingCache
from driving_sim.world_model.sampling.sampling import Sampling
from tests.fixtures.synthetic_worlds import TINY
from tests.fixtures.token_drives import COLS, FPS, ROWS
from tests.fixtures.world_models import W

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (12, 2))


def observations(env: DriveEnv, seed: int | None, actions: np.ndarray = ACTIONS) -> Pixels:
    first, _ = env.reset(seed=seed)
    return np.stack([first, *(env.step(action)[0] for action in actions)])


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_gymnasium_finds_nothing_to_complain_about(
    settings: dict[str, Any], frame_stack: int
) -> None:
    env = gymnasium.make(
        "drivesim/Drive-v0", frame_stack=frame_stack, render_mode="rgb_array", **settings
    )
    check_env(env.unwrapped)
    env.close()


def test_it_drives_in_the_packaged_model_by_default(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "synthetic")
    monkeypatch.setattr(run_folder, "MODELS", tmp_path)
    env = gymnasium.make("drivesim/Drive-v0")
    observation, info = env.reset(seed=1)
    assert observation.shape == (16 * ROWS, 16 * COLS, 3)
    assert info["context"] in ("a", "b")
    names = {env.reset(seed=seed)[1]["context"] for seed in range(8)}
    assert names == {"a", "b"}
    _, reward, *_ = env.step(np.zeros(2, np.float32))
    assert isinstance(reward, float)
    env.close()


def test_a_seed_gives_the_same_pictures_whatever_came_before(settings: dict[str, Any]) -> None:
    env = DriveEnv(**settings)
    expected = observations(env, 5)
    assert np.array_equal(observations(env, 5), expected)
    unseeded = observations(env, None)
    assert not np.array_equal(unseeded, expected)
    env.reset(seed=5)
    env.step(ACTIONS[0])
    assert np.array_equal(observations(env, None), unseeded)
    assert np.array_equal(observations(DriveEnv(**settings), 5), expected)
    assert not np.array_equal(observations(env, 6), expected)


def test_an_episode_is_a_session_whose_draw_is_the_seed(
    world: WorldModel, settings: dict[str, Any]
) -> None:
    env = DriveEnv(**settings, context="b", guidance=2.0)
    first, info = env.reset(seed=2**70 + 9)
    (start,) = find_starts(world, "b")
    prefix = world.encode_prefix(start.tokens, start.actions, start.valid)
    session = world.drive(prefix, sampling=Sampling(guidance=2.0), first_draw=9)
    assert np.array_equal(first, session.pixels[0])
    assert info["speed_mps"] == pytest.approx(start.actions[-1, 0])
    for action in ACTIONS:
        observation, _, _, _, info = env.step(action)
        frame = session.step([info["speed_mps"], info["steering"]])
        assert np.array_equal(observation, frame.pixels[0])
        assert info["surprise_nats"] == pytest.approx(-float(frame.log_probs.mean()), abs=1e-5)
        assert info["entropy_nats"] == pytest.approx(float(frame.entropy.mean()), abs=1e-5)
    assert info["time_s"] == len(ACTIONS) / FPS
    assert (info["context"], info["steering_unit"]) == ("b", "rad")


def test_actions_are_changes_of_speed_and_steering(env: DriveEnv) -> None:
    _, before = env.reset(seed=0)
    _, _, _, _, info = env.step([0.5, -1.0])
    assert info["speed_mps"] == pytest.approx(before["speed_mps"] + 0.5 * 3.0 / FPS)
    assert info["steering"] == pytest.approx(-0.3)  # the 99th percentile of the statistics
    _, _, _, _, clipped = env.step([9.0, 9.0])
    assert clipped["speed_mps"] == pytest.approx(info["speed_mps"] + 3.0 / FPS)
    assert clipped["steering"] == pytest.approx(0.3)
    for _ in range(60):
        _, _, _, _, info = env.step([1.0, 0.0])
    assert info["speed_mps"] == 5 + 3 * 2  # mean plus 3 standard deviations
    for _ in range(60):
        _, _, _, _, info = env.step([-1.0, 0.0])
    assert info["speed_mps"] == 0


def test_stacked_frames_begin_with_those_of_the_context(
    world: WorldModel, settings: dict[str, Any]
) -> None:
    env = DriveEnv(**settings, context="a", frame_stack=6)
    first, _ = env.reset(seed=3)
    (start,) = find_starts(world, "a", frame_stack=6)
    assert np.array_equal(first, world.tokenizer.decode(start.tokens[-6:]).numpy())
    assert first.shape == env.observation_space.shape
    plain = observations(DriveEnv(**settings, context="a"), 3)
    for number, action in enumerate(ACTIONS[:8], start=1):
        stack = env.step(action)[0]
        assert np.array_equal(stack[-1], plain[number])
        assert np.array_equal(stack[-2], plain[number - 1])
    assert np.array_equal(stack, plain[3:9])


def test_reward_and_end_are_the_users(world: WorldModel) -> None:
    seen: list[Moment] = []

    def reward(moment: Moment) -> np.ndarray:
        seen.append(moment)
        return moment.speed_mps + 100 * moment.actions[:, 1]

    env = DriveEnv(world, reward=reward, end=lambda moment: moment.time_s > 3.5 / FPS)
    env.reset(seed=0)
    for number in range(4):
        observation, value, terminated, truncated, info = env.step([0.0, 0.1])
        assert value == pytest.approx(info["speed_mps"] + 10)
        assert terminated == (number == 3)
        assert truncated is False
        assert np.array_equal(seen[-1].frames[0], observation)
    surprises = [float(moment.surprise_nats[0]) for moment in seen]
    assert float(seen[-1].recent_surprise_nats[0]) == pytest.approx(np.mean(surprises))
    with pytest.raises(DriveSimError, match="the episode has ended; call `reset`"):
        env.step([0.0, 0.0])
    env.reset()
    env.step([0.0, 0.0])


def test_the_picture_is_rendered(settings: dict[str, Any]) -> None:
    env: Any = DriveEnv(**settings, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    assert np.array_equal(env.render(), observation)
    observation, *_ = env.step([0.0, 0.0])
    picture = env.render()
    assert np.array_equal(picture, observation)
    picture[:] = 0
    assert np.array_equal(env.render(), observation)
    assert env.metadata["render_fps"] == FPS
    with pytest.raises(DriveSimError, match='`render_mode` human: must be None or "rgb_array"'):
        DriveEnv(**settings, render_mode="human")


def test_changing_an_observation_changes_nothing_else(settings: dict[str, Any]) -> None:
    env = DriveEnv(**settings, frame_stack=2)
    expected = observations(env, 1)
    first, _ = env.reset(seed=1)
    first[:] = 0
    for number, action in enumerate(ACTIONS, start=1):
        observation, *_ = env.step(action)
        assert np.array_equal(observation, expected[number])
        observation[:] = 0


def test_a_closed_environment_says_so(settings: dict[str, Any]) -> None:
    env: Any = DriveEnv(**settings, render_mode="rgb_array")
    for use in (lambda: env.step([0.0, 0.0]), env.render):
        with pytest.raises(DriveSimError, match="no episode has begun; call `reset` first"):
            use()
    env.reset(seed=0)
    env.close()
    env.close()
    for use in (lambda: env.step([0.0, 0.0]), env.render, env.reset):
        with pytest.raises(DriveSimError, match="this environment was closed; make a new one"):
            use()


def test_wrong_actions_and_settings_are_one_line(settings: dict[str, Any]) -> None:
    env = DriveEnv(**settings)
    env.reset(seed=0)
    for wrong, message in (
        ([0.0, np.nan], "NaN or infinite"),
        ([np.inf, 0.0], "NaN or infinite"),
        ([0.0], r"shape \[1, 1\]: must be \[1, 2\]"),
    ):
        with pytest.raises(DriveSimError, match=message):
            env.step(wrong)
    wrong_settings: list[tuple[str, Any, str]] = [
        ("frame_stack", 0, "`frame_stack` 0: must be at least 1"),
        ("acceleration_mps2", -1.0, "`acceleration_mps2` -1: must be a positive number"),
        ("guidance", -2.0, "`guidance` -2: must be a finite number of 0 or more"),
    ]
    for name, value, message in wrong_settings:
        with pytest.raises(DriveSimError, match=message) as error:
            DriveEnv(**settings, **{name: value})
        assert "\n" not in str(error.value)
    for name in ("reward", "end"):
        env = DriveEnv(**settings | {name: lambda moment: 1.0})
        env.reset(seed=0)
        with pytest.raises(DriveSimError, match=rf"`{name}` returned an array of shape \[\]"):
            env.step([0.0, 0.0])


def test_a_model_that_is_not_complete_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="no-such holds no world model"):
        DriveEnv("no-such")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    shutil.rmtree(damaged / "tokenizer")
    with pytest.raises(DriveSimError, match="holds no tokenizer"):
        gymnasium.make("drivesim/Drive-v0", model=damaged)


def test_contexts_that_do_not_fit_are_one_line(
    world: WorldModel, drives: list[Path], tmp_path: Path
) -> None:
    slow = write_synthetic_drives(
        tmp_path / "slow", drives=1, seconds=3.0, config=replace(TINY, fps=4.0)
    )
    short = write_synthetic_drives(
        tmp_path / "short", drives=1, seconds=0.3, config=replace(TINY, fps=FPS)
    )
    for context, message in (
        (slow[0], r"4 frames/s are too far from the model's 8"),
        (short[0], rf"has \d frames, but an episode begins with {2 * (W - 1)} \(0.5 s\)"),
        ("c", "`context` c: no such file or context; the model's own contexts are a, b"),
        ([], "`context` is an empty list"),
    ):
        with pytest.raises(DriveSimError, match=message) as error:
            DriveEnv(world, context)
        assert "\n" not in str(error.value)
    alone = WorldModel(
        world.transformer, world.tokenizer, fps=FPS, steering_kind=world.steering_kind
    )
    with pytest.raises(DriveSimError, match="has no contexts of its own; name a drive"):
        DriveEnv(alone)
    env = DriveEnv(alone, drives[0].parent)
    assert {env.reset(seed=seed)[1]["context"] for seed in range(8)} == {"drive_000", "drive_001"}
    env = DriveEnv(world, ["a", drives[1]])
    assert {env.reset(seed=seed)[1]["context"] for seed in range(8)} == {"a", "drive_001"}


def test_a_channel_without_training_data_is_said_once(
    world: WorldModel, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = WorldModel(world.transformer, world.tokenizer, fps=FPS, steering_kind=None)
    straight.run = world.run
    for _ in range(3):
        env = DriveEnv(straight)
    message = "the model was trained without steering, so the second number of an action has no"
    assert capsys.readouterr().err.count(message) == 1
    left, right = (observations(env, 4, np.array([[0.3, turn]] * 4)) for turn in (1.0, -1.0))
    assert np.array_equal(left, right)
    _, info = env.reset(seed=1)
    assert "steering" not in info
    assert "speed_mps" in info


def test_200_environments_leave_nothing_behind(settings: dict[str, Any]) -> None:
    process, before = psutil.Process(), 0
    gone: list[weakref.ref[Any]] = []
    for number in range(200):
        env = DriveEnv(**settings, context="a")
        env.reset(seed=number)
        env.step([0.0, 0.0])
        gone += [
            weakref.ref(env),
            weakref.ref(env._simulator),
            weakref.ref(env._simulator._session),
        ]
        if number % 2:
            env.close()
        del env
        if number == 50:
            gc.collect()
            before = process.memory_info().rss
    gc.collect()
    assert [reference for reference in gone if reference() is not None] == []
    assert process.memory_info().rss - before < 30e6


def test_open_environments_share_the_model_that_they_load(run: Path) -> None:
    first, second = DriveEnv(run), DriveEnv(str(run))
    assert first.world is second.world
    model = weakref.ref(first.world)
    del first, second
    gc.collect()
    assert model() is None


def test_a_missing_extra_is_one_line() -> None:
    program = """
import sys
sys.modules["gymnasium"] = None
try:
    import driving_sim.env
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == (
        "driving_sim.env needs gymnasium 1.1 or newer; install it with `pip install "
        "'drivesim[env]'`\n"
    )


def test_torch_passes_drive_too(world: WorldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVESIM_NATIVE", "0")
    model = WorldModel.from_run(world.run or "", "cpu", "fp32")
    env = DriveEnv(model, reward=lambda moment: moment.speed_mps)
    assert np.array_equal(observations(env, 5), observations(env, 5))
    assert isinstance(env._simulator._driving()._now.passes.cache, RingCache)


def test_files_in_the_working_directory_do_not_hide_a_runs_contexts(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    env = DriveEnv(**settings)
    assert env.reset(seed=0)[1]["context"] in ("a", "b")
    with pytest.raises(DriveSimError, match="a"):
        DriveEnv(**settings, context="a")  # a path comes first if the user names it
