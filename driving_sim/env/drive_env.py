"""The Gymnasium environment in which one agent drives in a world model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import logger
from numpy.typing import ArrayLike, NDArray

from driving_sim.data.arrays import Pixels
from driving_sim.engine.errors import DriveSimError
from driving_sim.env.controls import ACCELERATION_MPS2
from driving_sim.env.rewards import End, Reward
from driving_sim.env.simulator import MODEL, Simulator
from driving_sim.env.starts import ContextName
from driving_sim.world_model.world_model import WorldModel

RENDER_MODES = ["rgb_array"]


class DriveEnv(gymnasium.Env[Pixels, NDArray[np.float32]]):
    """Drive in a world model: see pictures, choose the change of speed and the steering.

    An observation is a picture, uint8 [H, W, 3], or the last k pictures [k, H, W, 3]. An action is
    two numbers in [-1, 1]. The first one changes the speed: 1 accelerates by `acceleration_mps2`.
    The second one is the steering, left positive: 1 is the 99th percentile of the training data's
    |steering|.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": RENDER_MODES}  # type: ignore[misc]

    def __init__(
        self,
        model: WorldModel | Path | str = MODEL,
        context: ContextName | Iterable[ContextName] | None = None,
        *,
        frame_stack: int = 1,
        guidance: float = 1.0,
        acceleration_mps2: float = ACCELERATION_MPS2,
        reward: Reward | None = None,
        end: End | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Make an environment.

        `model` is a run folder, the name of a packaged model, or a loaded model. `context` is where
        episodes begin: the name of one of the run's contexts, the path of a drive, or a list of
        these; by default, all contexts of the run. An episode chooses one at random.
        `frame_stack` is the number of pictures in an observation, and `guidance` strengthens the
        effect of actions. `reward` and `end` are functions of a `Moment`; by default,
        `ProgressWithoutSurprise`. `end` is by default the one of the reward. `render_mode` is None
        or "rgb_array". Raises DriveSimError if one of these does not fit.
        """
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self._simulator = Simulator(
            1,
            model=model,
            context=context,
            frame_stack=frame_stack,
            guidance=guidance,
            acceleration_mps2=acceleration_mps2,
            reward=reward,
            end=end,
        )
        self.observation_space = self._simulator.observation_space
        self.action_space = self._simulator.action_space
        fps = self._simulator.world.fps
        self.metadata = {**type(self).metadata, "render_fps": fps}  # type: ignore[misc]
        self._has_ended = False

    @property
    def world(self) -> WorldModel:
        """The model that the environment drives in."""
        return self._simulator.world

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Pixels, dict[str, Any]]:
        """Begin an episode; return the first observation and info.

        The same seed and actions give the same observations, to the last bit. `options` are not
        used.
        """
        super().reset(seed=seed)
        self._simulator.begin([0], [self._simulator.episode(self.np_random, seed)])
        self._has_ended = False
        return self._simulator.observations()[0], self._simulator.info(0)

    def step(self, action: ArrayLike) -> tuple[Pixels, float, bool, bool, dict[str, Any]]:
        """Drive one frame further; return observation, reward, terminated, truncated and info."""
        if self._simulator.has_begun and self._has_ended:
            raise DriveSimError("the episode has ended; call `reset` to begin another one")
        rewards, ends = self._simulator.step(np.asarray(action, np.float64)[None])
        self._has_ended = bool(ends[0])
        observation, info = self._simulator.observations()[0], self._simulator.info(0)
        return observation, float(rewards[0]), self._has_ended, False, info

    def render(self) -> Pixels | None:
        """Return the current picture, uint8 [H, W, 3], or None if there is no `render_mode`."""
        if self.render_mode is None:
            logger.warn("`render` was called, but the environment was made without `render_mode`")
            return None
        return np.asarray(self._simulator.pictures()[0])

    def close(self) -> None:
        """End the episode and free its memory. Using the environment afterwards is an error."""
        self._simulator.close()


def check_render_mode(render_mode: str | None) -> None:
    """Raise DriveSimError unless `render_mode` is None or one of `RENDER_MODES`."""
    if render_mode not in (None, *RENDER_MODES):
        raise DriveSimError(f'`render_mode` {render_mode}: must be None or "rgb_array"')
