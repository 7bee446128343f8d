"""N drives in one world model, stepped together: what both environments are made of.

Axes: N environments, k stacked frames, r c token rows and columns, H W pixels.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray

from driving_sim.data.actions.action_log import UNITS
from driving_sim.data.arrays import Floats, Pixels
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.run_folder import find_run
from driving_sim.env.controls import Controls
from driving_sim.env.gauges import Gauges
from driving_sim.env.moment import Moment
from driving_sim.env.rewards import (
    RECENT_S,
    End,
    ProgressWithoutSurprise,
    Reward,
    end_of,
    values_of,
)
from driving_sim.env.starts import ContextName, Start, find_starts, stacked
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import Frame, Prefix, Session
from driving_sim.world_model.world_model import WorldModel

MODEL = "synthetic"
"""Name of the packaged model that environments drive in by default."""

_MOST_PREFIXES = 4
_loaded: "WeakValueDictionary[tuple[Path, int], WorldModel]" = WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class Episode:
    """How an episode begins: its context, and which random numbers it draws."""

    start: Start
    draw: int


class Simulator:
    """N drives, each an episode of its own, in one batch.

    The random numbers of an episode depend only on its draw. With compiled passes, the same draw
    and actions give the same tokens in any batch whose episodes begin together.
    """

    def __init__(
        self,
        count: int,
        *,
        model: WorldModel | Path | str,
        context: ContextName | Iterable[ContextName] | None,
        frame_stack: int,
        guidance: float,
        acceleration_mps2: float,
        reward: Reward | None,
        end: End | None,
    ) -> None:
        for name, number in (("num_envs", count), ("frame_stack", frame_stack)):
            if number < 1:
                raise DriveSimError(f"`{name}` {number}: must be at least 1")
        self.count, self.stack = count, frame_stack
        self.world = model if isinstance(model, WorldModel) else _load(model)
        self.starts = find_starts(self.world, context, frame_stack)
        self.controls = Controls.of(self.world, acceleration_mps2)
        self._reward: Reward = ProgressWithoutSurprise() if reward is None else reward
        self._end = end_of(self._reward) if end is None else end
        if not 0 <= guidance < np.inf:
            raise DriveSimError(f"`guidance` {guidance:g}: must be a finite number of 0 or more")
        self._sampling = Sampling(guidance=guidance)
        self._gauges = Gauges(self.world, self.starts)
        self._prefixes: dict[Start, Prefix] = {}
        self._session: Session | None = None
        self._is_closed = False
        size = self.world.tokenizer
        picture = (size.height, size.width, 3)
        stacked_picture = picture if frame_stack == 1 else (frame_stack, *picture)
        self.observation_space = Box(0, 255, stacked_picture, np.uint8)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self._frames: Pixels = np.zeros((count, frame_stack, *picture), np.uint8)
        self._speed, self._steering = np.full((2, count), np.nan)
        self._steps = np.zeros(count, np.int64)
        self._contexts = [""] * count
        recent = max(1, round(RECENT_S * self.world.fps))
        self._recent = [deque[float](maxlen=recent) for _ in range(count)]
        self._moment: Moment | None = None

    def close(self) -> None:
        """End the session and free its memory. Using it afterwards raises DriveSimError."""
        if self._session is not None:
            self._session.close()
        self._session, self._moment, self._is_closed = None, None, True
        self._prefixes.clear()

    @property
    def has_begun(self) -> bool:
        """Whether all environments have begun an episode. Raises DriveSimError once closed."""
        self._check_open()
        return self._session is not None

    def _check_open(self) -> None:
        if self._is_closed:
            raise DriveSimError("this environment was closed; make a new one")

    def _driving(self) -> Session:
        self._check_open()
        if self._session is None:
            raise DriveSimError("no episode has begun; call `reset` first")
        return self._session

    def episode(self, rng: np.random.Generator, seed: int | None) -> Episode:
        """Choose a context at random. The draw is `seed`, or a random number."""
        start = self.starts[int(rng.integers(len(self.starts)))]
        return Episode(start, int(rng.integers(2**62)) if seed is None else seed % 2**63)

    def begin(self, rows: Sequence[int], episodes: Sequence[Episode]) -> None:
        """Begin an episode in each of the environments `rows`, while the others drive on.

        `rows` ascend. If the episodes of all environments begin, they are independent of what was
        driven before.
        """
        starts = [episode.start for episode in episodes]
        draws = [episode.draw for episode in episodes]
        self._check_open()
        if len(rows) == self.count:
            self._open(starts, draws)
        else:
            self._driving().restart(rows, *stacked(starts), draws=draws)
        self._frames = self._frames.copy()
        for row, start in zip(rows, starts, strict=True):
            self._frames[row] = start.pictures
            known = self.controls.known
            self._speed[row] = self.controls.first_speed(start.last_speed) if known[0] else np.nan
            self._steering[row] = start.last_steering if known[1] else np.nan
            self._steps[row], self._contexts[row] = 0, start.name
            self._recent[row].clear()

    def _open(self, starts: Sequence[Start], draws: Sequence[int]) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        alike = len(set(starts)) == 1
        prefix = self._prefix(starts[0]) if alike else self.world.encode_prefix(*stacked(starts))
        self._session = self.world.drive(
            prefix, branches=self.count, sampling=self._sampling, draws=draws, history_s=0.0
        )

    def _prefix(self, start: Start) -> Prefix:
        """Return an encoded context. A few are kept, because many episodes begin alike."""
        if start not in self._prefixes:
            if len(self._prefixes) == _MOST_PREFIXES:
                self._prefixes.clear()
            self._prefixes[start] = self.world.encode_prefix(
                start.tokens, start.actions, start.valid
            )
        return self._prefixes[start]

    def step(self, actions: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
        """Drive all environments one frame further by actions [N, 2] in [-1, 1].

        Returns the rewards [N], and whether the episodes end [N].
        """
        session = self._driving()
        checked = self.controls.checked(actions, self.count)
        self._speed, self._steering = self.controls.apply(checked, self._speed)
        driven = np.stack([self._speed, self._steering], axis=1)
        try:
            frame = session.step(driven, np.broadcast_to(self.controls.known, driven.shape))
        except BaseException:
            self._session = None  # a step that fails ends the session
            raise
        self._frames = np.concatenate([self._frames[:, 1:], frame.pixels[:, None]], axis=1)
        self._steps += 1
        self._moment = moment = self._moment_of(frame, checked)
        rewards = values_of(self._reward, moment, "reward").astype(np.float64)
        return rewards, values_of(self._end, moment, "end").astype(np.bool_)

    def _moment_of(self, frame: Frame, actions: Floats) -> Moment:
        surprise = -_means(frame.log_probs)
        for recent, value in zip(self._recent, surprise, strict=True):
            recent.append(float(value))
        steering = self._steering if self.controls.known[1] else np.full(self.count, np.nan)
        return Moment(
            frames=self._frames[:, -1].copy(),
            tokens=frame.tokens.cpu().numpy(),
            actions=actions,
            speed_mps=self._speed.copy(),
            steering=steering.copy(),
            surprise_nats=surprise,
            recent_surprise_nats=np.array([np.mean(recent) for recent in self._recent]),
            entropy_nats=_means(frame.entropy),
            time_s=self._steps / self.world.fps,
            step_s=self.controls.step_s,
            contexts=tuple(self._contexts),
            gauges=self._gauges,
        )

    def observations(self) -> Pixels:
        """Return the observations, uint8 [N, H, W, 3] or, of stacked frames, [N, k, H, W, 3]."""
        return (self._frames[:, 0] if self.stack == 1 else self._frames).copy()

    def pictures(self) -> Pixels:
        """Return the current pictures, uint8 [N, H, W, 3]."""
        self._driving()
        return self._frames[:, -1].copy()

    def info(self, row: int) -> dict[str, Any]:
        """Return what is known of an environment besides its picture: see docs/env.md."""
        facts: dict[str, Any] = {
            "time_s": float(self._steps[row] / self.world.fps),
            "context": self._contexts[row],
        }
        if self.controls.known[0]:
            facts["speed_mps"] = float(self._speed[row])
        if self.controls.known[1]:
            facts["steering"] = float(self._steering[row])
        if self.world.steering_kind is not None:
            facts["steering_unit"] = UNITS[self.world.steering_kind]
        if self._moment is not None and self._steps[row]:
            facts["surprise_nats"] = float(self._moment.surprise_nats[row])
            facts["entropy_nats"] = float(self._moment.entropy_nats[row])
        return facts


def _means(values: Any) -> Floats:
    """Return the mean over the tokens of each future, [N]."""
    means: Floats = values.cpu().double().mean((1, 2)).numpy()
    return means


def _load(run: Path | str) -> WorldModel:
    """Load a model. It is shared with all environments that are open and use the same files."""
    weights = find_run(run).resolve() / "model.safetensors"
    key = weights, weights.stat().st_mtime_ns if weights.is_file() else 0
    world = _loaded.get(key)
    if world is None:
        world = _loaded[key] = WorldModel.from_run(run)
    return world
