from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from driving_sim.data.arrays import Pixels
from driving_sim.engine.errors import DriveSimError
from driving_sim.env import DriveEnv, DriveVectorEnv, Moment, never
from driving_sim.world_model import WorldModel
from tests.fixtures.token_drives import FPS
from tests.fixtures.world_models import WIDE, needs_compiler, random_model

N = 3
ACTIONS = np.random.default_rng(1).uniform(-1, 1, (14, N, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def shallow(world: WorldModel) -> WorldModel:
    """Return a model of one layer, whose episodes do not depend on when they begin.

    With more layers, the keys of a frame contain more of the past the later an episode begins.
    """
    config = replace(WIDE, layers=1)
    transformer = random_model(config, world.transformer.grid)
    model = WorldModel(transformer, world.tokenizer, fps=FPS, steering_kind="road_wheel")
    model.run = world.run
    return model


def reward(moment: Moment) -> np.ndarray:
    return np.asarray(moment.speed_mps + moment.tokens.mean((1, 2)))


def turned_left(moment: Moment) -> np.ndarray:
    """End an episode by an action that differs between the environments."""
    return moment.actions[:, 1] > 0.75


def pair(
    world: WorldModel, mode: AutoresetMode, end: Any = turned_left, **options: Any
) -> tuple[DriveVectorEnv, SyncVectorEnv[Any, Any]]:
    settings = {"model": world, "reward": reward, "end": end, **options}
    fast = gymnasium.make_vec(
        "drivesim/Drive-v0", N, max_episode_steps=5, autoreset_mode=mode, **settings
    )
    assert isinstance(fast, DriveVectorEnv)

    def make() -> Any:
        return gymnasium.make("drivesim/Drive-v0", max_episode_steps=5, **settings)

    return fast, SyncVectorEnv([make] * N, autoreset_mode=mode)


def near(ours: Pixels, theirs: Pixels) -> bool:
    """Return whether pictures are the same up to one grey level.

    The tokenizer's rounding depends on how many frames it decodes together.
    """
    return ours.shape == theirs.shape and bool((abs(ours.astype(int) - theirs) <= 1).all())


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare observations, rewards, ends and infos; infos with all their masks and types."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, tuple):
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif ours.dtype == object:
        for a, b in zip(ours, theirs, strict=True):
            assert (a == b) if isinstance(a, str | None) else np.array_equal(a, b)
    else:
        assert ours.dtype == theirs.dtype
        if ours.dtype == np.float64:
            # A frame's surprise is rounded otherwise once the frames have other numbers.
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        elif ours.dtype == np.uint8:
            assert near(ours, theirs)
        else:
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("frame_stack", [1, 3])
def test_it_does_what_gymnasiums_vector_environment_does(
    shallow: WorldModel, mode: AutoresetMode, frame_stack: int
) -> None:
    fast, slow = pair(shallow, mode, frame_stack=frame_stack)
    assert fast.observation_space == slow.observation_space
    assert fast.action_space == slow.action_space
    assert fast.metadata["autoreset_mode"] == mode
    assert_same(fast.reset(seed=11), slow.reset(seed=11))
    ended = np.zeros(N, np.int64)
    for actions in ACTIONS:
        ours, theirs = fast.step(actions), slow.step(actions)
        assert_same(ours, theirs)
        ended += ours[2] | ours[3]
    assert (ended >= 2).all()  # each environment has begun again, at a time of its own
    assert_same(fast.reset(), slow.reset())
    assert_same(fast.reset(seed=[4, None, 6]), slow.reset(seed=[4, None, 6]))
    assert_same(fast.step(ACTIONS[0]), slow.step(ACTIONS[0]))
    fast.close()
    slow.close()


def test_ended_episodes_wait_for_a_reset_when_autoreset_is_disabled(shallow: WorldModel) -> None:
    fast, slow = pair(shallow, AutoresetMode.DISABLED)
    assert_same(fast.reset(seed=7), slow.reset(seed=7))
    waits = 0
    for actions in ACTIONS:
        ours, theirs = fast.step(actions), slow.step(actions)
        assert_same(ours, theirs)
        ended = ours[2] | ours[3]
        if ended.any():
            waits += 1
            with pytest.raises(DriveSimError, match="have ended; call `reset` with"):
                fast.step(actions)
            options = [{"reset_mask": ended.copy()} for _ in range(2)]
            assert_same(fast.reset(options=options[0]), slow.reset(options=options[1]))
            assert "reset_mask" in options[0]
    assert waits >= 4


@needs_compiler
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("context", [None, "a"])
def test_environments_draw_exactly_what_single_ones_draw(
    world: WorldModel, guidance: float, context: str | None
) -> None:
    drawn: list[np.ndarray] = []

    def noting(moment: Moment) -> np.ndarray:
        drawn.append(moment.tokens)
        return moment.speed_mps

    settings: dict[str, Any] = {"model": world, "context": context, "guidance": guidance}
    settings |= {"reward": noting, "end": never}
    vector, seeds = DriveVectorEnv(N, **settings), [40, 3, 77]
    first, _ = vector.reset(seed=seeds)
    steps = [vector.step(actions) for actions in ACTIONS]
    together = np.stack(drawn, axis=1)
    for row, seed in enumerate(seeds):
        env = DriveEnv(**settings)
        assert near(env.reset(seed=seed)[0], first[row])
        drawn.clear()
        for actions, (observations, rewards, _, _, infos) in zip(ACTIONS, steps, strict=True):
            observation, value, _, _, info = env.step(actions[row])
            assert near(observation, observations[row])
            assert value == rewards[row]
            assert info == {name: infos[name][row] for name in info}
        assert np.array_equal(np.concatenate(drawn), together[row])


def test_a_masked_reset_begins_episodes_and_leaves_the_others_alone(shallow: WorldModel) -> None:
    settings: dict[str, Any] = {"model": shallow, "reward": reward, "end": never}
    vector, other = (DriveVectorEnv(N, **settings) for _ in range(2))
    vector.reset(seed=1)
    other.reset(seed=1)
    for actions in ACTIONS[:3]:
        vector.step(actions)
        other.step(actions)
    mask = np.array([False, True, False])
    observations, infos = vector.reset(seed=[0, 9, 0], options={"reset_mask": mask})
    assert infos["_time_s"].tolist() == [False, True, False]
    env = DriveEnv(**settings)
    assert near(observations[1], env.reset(seed=9)[0])
    for actions in ACTIONS[3:]:
        ours, expected = vector.step(actions)[0], other.step(actions)[0]
        assert np.array_equal(ours[[0, 2]], expected[[0, 2]])
        assert near(ours[1], env.step(actions[1])[0])


def test_wrong_masks_and_seeds_are_refused(world: WorldModel) -> None:
    vector = DriveVectorEnv(N, world, reward=reward)
    with pytest.raises(ValueError, match="seed has 2 entries, not 3"):
        vector.reset(seed=[1, 2])
    with pytest.raises(DriveSimError, match="no episode has begun"):
        vector.reset(options={"reset_mask": np.array([True, False, False])})
    vector.reset(seed=1)
    for mask in ([True] * 3, np.zeros(3, np.bool_), np.ones(2, np.bool_), np.ones(3)):
        with pytest.raises(ValueError, match=r"must be a bool array \[3\] with a true value"):
            vector.reset(options={"reset_mask": mask})
    with pytest.raises(DriveSimError, match=r"shape \[2, 2\]: must be \[3, 2\]"):
        vector.step(np.zeros((2, 2)))
    with pytest.raises(DriveSimError, match="`num_envs` 0: must be at least 1"):
        DriveVectorEnv(0, world)


def test_a_context_that_only_a_part_of_the_environments_begins_in(
    world: WorldModel, drives: list[Path]
) -> None:
    vector = DriveVectorEnv(8, world, ["a", "b", *drives], reward=reward)
    _, infos = vector.reset(seed=0)
    assert len(set(infos["context"])) >= 3
    assert vector.step(np.zeros((8, 2)))[0].shape == vector.observation_space.shape


def test_pictures_are_rendered_and_closing_ends(world: WorldModel) -> None:
    vector = DriveVectorEnv(2, world, reward=reward, render_mode="rgb_array")
    observations, _ = vector.reset(seed=0)
    pictures = vector.render()
    assert pictures is not None
    assert np.array_equal(pictures, observations)
    assert vector.metadata["render_fps"] == FPS
    vector.close()
    vector.close()
    with pytest.raises(DriveSimError, match="this environment was closed"):
        vector.step(np.zeros((2, 2)))


def test_minus_one_means_no_limit_of_steps(settings: dict[str, Any]) -> None:
    envs = DriveVectorEnv(2, **settings, end=never, max_episode_steps=-1)
    envs.reset(seed=0)
    for _ in range(3):
        *_, truncations, _ = envs.step(np.zeros((2, 2)))
        assert not truncations.any()
    with pytest.raises(DriveSimError, match="`max_episode_steps` 0: must be at least 1"):
        DriveVectorEnv(2, **settings, max_episode_steps=0)
