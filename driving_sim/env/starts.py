"""The contexts that episodes begin with: those of the run, or drives that the user names.

Axes: T frames of a context, r c token rows and columns, H W pixels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Floats32, Mask, Pixels
from driving_sim.data.drive import Drive
from driving_sim.engine.errors import DriveSimError
from driving_sim.world_model.contexts import contexts_of, find_for
from driving_sim.world_model.rollout import context_from_drive, context_range, sample_for
from driving_sim.world_model.world_model import WorldModel

ContextName = str | Path
"""Name of one of the run's own contexts, or path of a drive or of a folder of drives."""


@dataclass(frozen=True, eq=False)
class Start:
    """A context in which an episode can begin. Its frames are read when they are first needed."""

    world: WorldModel
    drive: Drive
    start_s: float | None
    """Time of the last frame in the drive. None: the earliest time with enough frames before it."""
    frames: int
    """Number of frames, T."""
    shown: int = 1
    """Number of frames that an episode's first observation shows."""

    @property
    def name(self) -> str:
        """Name of the context."""
        return self.drive.id

    @cached_property
    def _context(self) -> tuple[Tensor, Floats32, Mask]:
        context = context_from_drive(self.world, self.drive, self.start_s, self.frames)
        past = self.frames - 1
        return context.tokens, context.actions[:past], context.action_valid[:past]

    @property
    def tokens(self) -> Tensor:
        """Tokens, int64 [T, r, c]."""
        return self._context[0]

    @property
    def actions(self) -> Floats32:
        """Actions [T - 1, 2] between the frames."""
        return self._context[1]

    @property
    def valid(self) -> Mask:
        """Whether each of the actions is known, [T - 1, 2]."""
        return self._context[2]

    @cached_property
    def pictures(self) -> Pixels:
        """The last `shown` frames as the tokenizer shows them, uint8 [shown, H, W, 3]."""
        return self.world.tokenizer.decode(self.tokens[-self.shown :]).numpy()

    @property
    def last_speed(self) -> float:
        """Speed in m/s that led to the last frame, or NaN."""
        return self._last(SPEED)

    @property
    def last_steering(self) -> float:
        """Steering that led to the last frame, or NaN."""
        return self._last(STEERING)

    def _last(self, channel: int) -> float:
        return float(self.actions[-1, channel]) if self.valid[-1, channel] else np.nan

    def check(self) -> None:
        """Raise DriveSimError if the drive does not fit the model, or is too short."""
        sampled = sample_for(self.world, self.drive)
        begin, stop, _ = context_range(
            sampled.timestamps, sampled.segments, self.start_s, self.frames, self.name
        )
        if stop - begin < self.frames:
            raise DriveSimError(
                f"{self.name}: the context has {stop - begin} frames, but an episode begins with "
                f"{self.frames} ({self.frames / self.world.fps:.3g} s); use a longer drive"
            )


def find_starts(
    world: WorldModel, context: ContextName | Iterable[ContextName] | None, frame_stack: int = 1
) -> list[Start]:
    """Return the contexts that `context` names, each with the frames that an episode needs.

    None means all contexts of the model's run. One of these starts episodes at its end, another
    drive at the earliest time with enough frames before it. Raises DriveSimError if there is no
    such context, or if one is too short or does not fit the model.
    """
    # `Session.restart` needs 2 (W - 1) frames, and a model can use the last W + 1 frames.
    window = world.context_frames
    frames = max(2 * (window - 1), window + 1, frame_stack)
    own = contexts_of(world.run) if world.run else {}
    if context is None:
        chosen = [(path, True) for path in own.values()]
    else:
        names = [context] if isinstance(context, str | Path) else list(context)
        chosen = [_named(name, own) for name in names]
    if not chosen:
        owner = world.run or "a model that was not loaded from a run"
        raise DriveSimError(
            f"{owner} has no contexts of its own; name a drive, as `context=PATH` of a video"
            if context is None
            else "`context` is an empty list; name a drive in it, or leave it out"
        )
    starts: list[Start] = []
    for path, is_own in chosen:
        for drive in find_for(world, [path]).drives:
            end = float(sample_for(world, drive).timestamps[-1]) if is_own else None
            starts.append(Start(world, drive, end, frames, frame_stack))
            starts[-1].check()
    return starts


def _named(name: ContextName, own: Mapping[str, Path]) -> tuple[Path, bool]:
    """Return the path of a drive or context, and whether it is one of the run's own contexts."""
    if Path(name).exists():
        return Path(name), False
    if str(name) in own:
        return own[str(name)], True
    known = f"; the model's own contexts are {', '.join(own)}" if own else ""
    raise DriveSimError(f"`context` {name}: no such file or context{known}")


def stacked(starts: Iterable[Start]) -> tuple[Tensor, Floats32, Mask]:
    """Return tokens [C, T, r, c], actions and validity [C, T - 1, 2] of C contexts."""
    tokens, actions, valid = zip(*(start._context for start in starts), strict=True)
    return torch.stack(tokens), np.stack(actions), np.stack(valid)
