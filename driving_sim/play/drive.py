"""A drive of one person: the session, the car, who holds the wheel, and what happened so far.

Axes: N frames, r c token rows and columns, H W pixels.
"""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from driving_sim.data.actions.action_log import SPEED
from driving_sim.data.arrays import Floats32, Pixels
from driving_sim.engine.errors import DriveSimError
from driving_sim.play.car import Car, Held
from driving_sim.play.replay import Change, Replay, checksum, nullable
from driving_sim.play.starts import Start, Truth
from driving_sim.tokenizer.metrics import psnr
from driving_sim.tokenizer.tokenizer import frames_from_images, images_from_frames
from driving_sim.world_model.action_plan import ActionPlan, Situation, make_plan_without_files
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import HISTORY_S
from driving_sim.world_model.world_model import WorldModel

BRANCHES = ("left", "straight", "right")
_WHAT_IF_S = 2.0
_LONGEST_PLAN_S = 600.0


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """A frame of the drive, as the driver sees it."""

    frame: int
    """Number of frames since the start; 0 is the last frame of the context."""
    pixels: Pixels
    """uint8 [H, W, 3]."""
    car: Car
    """The car whose action led to the frame."""
    entropy: Floats32 | None
    """Entropy of the frame's tokens in nats, [r, c]; None if the model did not generate it."""


@dataclass(frozen=True, slots=True, eq=False)
class Possibility:
    """One frame of several possible futures, one for each of `BRANCHES`."""

    step: int
    steps: int
    actions: Floats32
    """Speed and steering of each future, [3, 2]."""
    pixels: Pixels
    """uint8 [3, H, W, 3]."""
    truths: Pixels | None
    """What truly happens under the same actions, uint8 [3, H, W, 3]; None if nobody knows."""
    psnr_db: tuple[float, ...] | None
    """PSNR of each future with its truth."""


@dataclass(frozen=True, slots=True)
class _Driven:
    """What led to a frame, and the checksum of its tokens."""

    car: Car
    sampling: Sampling
    checksum: int


class Drive:
    """One person's drive. Not thread-safe: the server calls it from one thread."""

    def __init__(self, world: WorldModel, model: str, starts: Mapping[str, Start]) -> None:
        """Begin at the first of `starts`; `model` is the name or the run folder of the model."""
        self.world, self.model, self.starts = world, model, starts
        self._begin(next(iter(starts.values())), Sampling())

    def find(self, start: str) -> Start:
        """Return the start of this name. Raises DriveSimError if there is none."""
        if start not in self.starts:
            raise DriveSimError(f"no start has this name; choose one of {', '.join(self.starts)}")
        return self.starts[start]

    def begin(self, start: Start) -> None:
        """Begin again from a start, with the settings of now."""
        sampling = self.sampling
        self._session.close()
        self._begin(start, sampling)

    def _begin(self, start: Start, sampling: Sampling) -> None:
        context = start.context
        past = len(context.tokens) - 1
        self._session = self.world.drive(context, sampling=sampling)
        self.start = start
        self._first = Car.of(self.world, context.actions[past - 1], context.action_valid[past - 1])
        self._first_sampling = sampling
        self._driven: list[_Driven] = []
        # One for each frame to which `rewind` can go back, even twice in a row.
        kept = 1 + round(HISTORY_S * self.world.fps) + self.world.context_frames
        self._entropies: deque[Floats32] = deque(maxlen=kept)
        self._plan: ActionPlan | None = None
        self._plan_name, self._plan_began = "", 0
        self._rewinds: list[tuple[int, int]] = []

    def close(self) -> None:
        """End the drive and free its memory."""
        self._session.close()

    @property
    def has_ended(self) -> bool:
        """Whether the drive cannot go on, because it was closed or a frame failed."""
        return self._session.has_ended

    @property
    def frame(self) -> int:
        """Number of frames since the start."""
        return self._session.frame

    @property
    def car(self) -> Car:
        """The car at the current frame."""
        return self._driven[-1].car if self._driven else self._first

    @property
    def actions(self) -> Floats32:
        """The actions driven so far, [N, 2]; NaN where the model learned none."""
        driven = [frame.car.action for frame in self._driven]
        return np.array(driven, np.float32).reshape(-1, 2)

    @property
    def rewindable_s(self) -> float:
        """How many seconds `rewind` can go back."""
        return self._session.rewindable_s

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn. A change holds from the next frame on, and goes back with it."""
        return self._session.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._session.sampling = sampling

    @property
    def plan(self) -> str | None:
        """The plan that holds the wheel, or None if the driver holds it."""
        return self._plan_name if self._plan else None

    def now(self) -> Sight:
        """Return the current frame."""
        entropy = self._entropies[-1] if self._entropies else None
        return Sight(self.frame, self._session.pixels[0], self.car, entropy)

    def step(self, held: Held) -> Sight:
        """Drive one frame further. The car obeys the plan, or else the wheel and the pedals."""
        car = self._planned() if self._plan else self.car.after(held, 1 / self.world.fps)
        generated = self._session.step(car.action)
        self._driven.append(_Driven(car, self.sampling, checksum(generated.tokens[0])))
        self._entropies.append(generated.entropy[0].float().cpu().numpy())
        return Sight(self.frame, generated.pixels[0], car, self._entropies[-1])

    def rewind(self, seconds: float) -> int:
        """Go back by some seconds, or as far as possible; return the number of frames."""
        before = self.frame
        self._session.rewind(min(seconds, self.rewindable_s))
        frames = before - self.frame
        if frames:
            self._rewinds.append((before, self.frame))
            del self._driven[-frames:]
            for _ in range(min(frames, len(self._entropies))):
                self._entropies.pop()
            self._plan = None
        return frames

    def as_replay(self, first_frame: int) -> Replay:
        """Return what is needed to drive again, for a video that begins at `first_frame`."""
        world, context = self.world, self.start.context
        past = len(context.tokens) - 1
        return Replay(
            model=self.model,
            fingerprint=world.fingerprint,
            precision=world.precisions,
            fps=world.fps,
            start=self.start.name,
            start_s=context.start_s,
            context_tokens=_nested(context.tokens),
            context_actions=nullable(context.actions[:past], context.action_valid[:past]),
            changes=tuple(self._changes()),
            rewinds=tuple(self._rewinds),
            first_frame=first_frame,
            actions=nullable(self.actions),
            checksums=tuple(frame.checksum for frame in self._driven),
        )

    def _changes(self) -> Iterator[Change]:
        """Yield the settings that the drive began with, and each change that had an effect."""
        yield Change(frame=0, sampling=self._first_sampling)
        used = [self._first_sampling, *(driven.sampling for driven in self._driven)]
        for frame, (before, after) in enumerate(pairwise(used)):
            if before != after:
                yield Change(frame=frame, sampling=after)

    def hand_over(self, plan: str | None) -> None:
        """Hand the wheel to a plan, such as a script, or take it back.

        Raises DriveSimError if the plan is wrong, or if nothing recorded follows.
        """
        if plan is None:
            self._plan = None
            return
        situation = self._situation()
        if plan == "recorded" and situation.recorded is None:
            raise DriveSimError("nothing recorded follows this frame; drive yourself, or reset")
        self._plan = make_plan_without_files(plan, situation, _LONGEST_PLAN_S)
        self._plan_name, self._plan_began = " ".join(plan.split()), self.frame

    def _situation(self) -> Situation:
        situation = self.start.context.situation(self.world)
        recorded = None
        if situation.recorded is not None:
            following = slice(self.frame, self.frame + int(_LONGEST_PLAN_S * self.world.fps))
            actions, valid = situation.recorded
            if valid[following].any():
                recorded = actions[following], valid[following]
        return replace(
            situation,
            last_action=np.nan_to_num(self.car.action),
            last_valid=np.array(self.world.known_channels),
            recorded=recorded,
        )

    def _planned(self) -> Car:
        """Return the car at the next frame of the plan, which ends with its last action."""
        assert self._plan is not None
        at = self.frame - self._plan_began
        action, valid = self._plan.actions[at], self._plan.valid[at]
        if at + 1 == len(self._plan.actions):
            self._plan = None
        speed, steering = np.where(valid, action, [self.car.speed_mps, self.car.steering])
        return self.car.at(float(speed), float(steering))

    def possibilities(self) -> Generator[Possibility, None, None]:
        """Yield what follows from steering left, straight and right, frame by frame.

        The three futures branch off the current moment in one batch, with the same random numbers.
        """
        steps = round(_WHAT_IF_S * self.world.fps)
        statistics = self.world.statistics
        # A car that stands shows no difference, so let it drive slowly.
        speed = max(self.car.speed_mps, statistics.mean[SPEED] / 2)
        steering = (statistics.steering_p95, 0.0, -statistics.steering_p95)
        actions = np.array([self.car.at(speed, angle).action for angle in steering])
        # A simulator knows what truly happens only if both speed and steering are known.
        truth = self.start.truth if all(self.world.known_channels) else None
        truths = [truth.after(self.actions)] * len(actions) if truth else []
        with self._session.fork(len(actions)) as futures:
            for step in range(1, steps + 1):
                pixels = futures.step(actions).pixels
                if truths:
                    pairs = zip(truths, actions, strict=True)
                    truths = [truth.after(action[None]) for truth, action in pairs]
                yield self._compared(step, steps, actions, pixels, truths)

    def _compared(
        self, step: int, steps: int, actions: Floats32, pixels: Pixels, truths: Sequence[Truth]
    ) -> Possibility:
        if not truths:
            return Possibility(step, steps, actions, pixels, None, None)
        rendered = np.stack([truth.world.render(truth.state) for truth in truths])
        images = images_from_frames(torch.from_numpy(rendered), self.world.tokenizer.frame_size)
        true = frames_from_images(images)
        psnr_db = tuple(psnr(torch.from_numpy(pixels), true).tolist())
        return Possibility(step, steps, actions, pixels, true.numpy(), psnr_db)


def _nested(tokens: Tensor) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(tuple(row) for row in frame) for frame in tokens.tolist())
