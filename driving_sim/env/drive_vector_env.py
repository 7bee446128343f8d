"""The Gymnasium environment that drives N agents in one batch.

Axes: N environments.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from driving_sim.data.arrays import Floats, Pixels
from driving_sim.engine.errors import DriveSimError
from driving_sim.env.controls import ACCELERATION_MPS2
from driving_sim.env.drive_env import RENDER_MODES, check_render_mode
from driving_sim.env.rewards import End, Reward
from driving_sim.env.simulator import MODEL, Simulator
from driving_sim.env.starts import ContextName
from driving_sim.world_model.world_model import WorldModel

Bools = NDArray[np.bool_]


class DriveVectorEnv(VectorEnv[Pixels, NDArray[np.float32], NDArray[Any]]):
    """N `DriveEnv`s whose frames are computed in one batch, which is faster than one by one.

    With compiled passes, environment i has exactly the tokens of a `DriveEnv` with its seed until
    an episode begins while others drive on. Such an episode has the same random numbers, but its
    context is encoded from a few frames earlier, so some of its tokens differ. Pixels may differ by
    one grey level, because the rounding of the decoder depends on the number of frames.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": RENDER_MODES}  # type: ignore[misc]

    def __init__(
        self,
        num_envs: int = 1,
        model: WorldModel | Path | str = MODEL,
        context: ContextName | Iterable[ContextName] | None = None,
        *,
        frame_stack: int = 1,
        guidance: float = 1.0,
        acceleration_mps2: float = ACCELERATION_MPS2,
        reward: Reward | None = None,
        end: End | None = None,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        """Make N = `num_envs` environments with the settings of `DriveEnv`.

        An episode is truncated after `max_episode_steps`; None or -1 mean never. `autoreset_mode`
        says when an ended episode is followed by the next one: in the next step, in the same step,
        or when `reset` is called with `options={"reset_mask": mask}`.
        """
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.num_envs = num_envs
        self._simulator = Simulator(
            num_envs,
            model=model,
            context=context,
            frame_stack=frame_stack,
            guidance=guidance,
            acceleration_mps2=acceleration_mps2,
            reward=reward,
            end=end,
        )
        self.single_observation_space = self._simulator.observation_space
        self.single_action_space = self._simulator.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._mode = AutoresetMode(autoreset_mode)
        self.metadata = {  # type: ignore[misc]
            **type(self).metadata,
            "render_fps": self._simulator.world.fps,
            "autoreset_mode": self._mode,
        }
        most_steps = -1 if max_episode_steps is None else max_episode_steps
        if most_steps < 1 and most_steps != -1:
            raise DriveSimError(f"`max_episode_steps` {most_steps}: must be at least 1")
        self._most_steps = np.inf if most_steps == -1 else most_steps
        self._steps = np.zeros(num_envs, np.int64)
        self._ended: Bools = np.zeros(num_envs, np.bool_)
        self._generators: list[np.random.Generator | None] = [None] * num_envs

    @property
    def world(self) -> WorldModel:
        """The model that the environments drive in."""
        return self._simulator.world

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Pixels, dict[str, Any]]:
        """Begin episodes; return the observations and infos.

        With an int `seed`, environment i gets the seed `seed` + i. A list gives every environment
        its own seed, or None to go on with its random numbers. `options={"reset_mask": mask}` with
        a bool array [N] begins only the episodes where it is true. Raises ValueError for a list or
        mask of another length.
        """
        if seed is None:
            seed = [None] * self.num_envs
        elif isinstance(seed, int | np.integer):
            seed = [int(seed) + row for row in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed has {len(seed)} entries, not {self.num_envs} as num_envs")
        mask = self._mask((options or {}).get("reset_mask"))
        return self._begin(mask, seed, {})

    def _mask(self, mask: Any) -> Bools:
        if mask is None:
            return np.ones(self.num_envs, np.bool_)
        is_mask = isinstance(mask, np.ndarray) and mask.dtype == np.bool_
        if not is_mask or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f'options["reset_mask"] must be a bool array [{self.num_envs}] with a true value'
            )
        chosen: Bools = mask
        return chosen

    def _begin(
        self, mask: Bools, seeds: Sequence[int | None], infos: dict[str, Any]
    ) -> tuple[Pixels, dict[str, Any]]:
        """Begin episodes where `mask` is true; add their infos to `infos`."""
        rows = np.flatnonzero(mask).tolist()
        episodes = [self._simulator.episode(self._rng(row, seeds[row]), seeds[row]) for row in rows]
        self._simulator.begin(rows, episodes)
        self._steps[mask] = 0
        self._ended = self._ended & ~mask
        return self._simulator.observations(), self._with_infos(infos, rows)

    def _rng(self, row: int, seed: int | None) -> np.random.Generator:
        rng = self._generators[row]
        if rng is None or seed is not None:
            rng = self._generators[row] = seeding.np_random(seed)[0]
        return rng

    def _with_infos(self, infos: dict[str, Any], rows: Iterable[int]) -> dict[str, Any]:
        for row in rows:
            infos = self._add_info(infos, self._simulator.info(row), row)
        return infos

    def step(self, actions: ArrayLike) -> tuple[Pixels, Floats, Bools, Bools, dict[str, Any]]:
        """Drive all environments one frame further.

        Returns observations, rewards [N], terminations [N], truncations [N] and infos. Raises
        DriveSimError if an episode has ended and the autoreset mode is DISABLED.
        """
        begins = self._ended.copy()
        if self._mode == AutoresetMode.DISABLED and begins.any():
            raise DriveSimError(
                f"the episodes of environments {np.flatnonzero(begins).tolist()} have ended; call "
                '`reset` with options={"reset_mask": mask}'
            )
        if begins.any():
            actions = np.where(begins[:, None], 0.0, actions)  # these actions are ignored
        rewards, terminated = self._simulator.step(actions)
        self._steps += 1
        truncated = self._steps >= self._most_steps
        for values in (rewards, terminated, truncated):
            values[begins] = 0  # these environments begin an episode instead of a step
        self._ended = terminated | truncated
        ends_now = self._ended if self._mode == AutoresetMode.SAME_STEP else np.zeros_like(begins)
        infos = self._with_infos({}, np.flatnonzero(~begins & ~ends_now).tolist())
        observations = self._simulator.observations()
        if self._mode == AutoresetMode.SAME_STEP:
            begins = self._ended.copy()
            for row in np.flatnonzero(begins).tolist():
                final = {
                    "final_obs": observations[row],
                    "final_info": self._simulator.info(row),
                }
                infos = self._add_info(infos, final, row)
        if begins.any():
            observations, infos = self._begin(begins, [None] * self.num_envs, infos)
        return observations, rewards, terminated, truncated, infos

    def render(self) -> tuple[Pixels, ...] | None:
        """Return the current pictures, uint8 [H, W, 3] each, or None without a `render_mode`."""
        return None if self.render_mode is None else tuple(self._simulator.pictures())

    def close_extras(self, **_: Any) -> None:
        """End the episodes and free their memory. `close` calls this."""
        self._simulator.close()
