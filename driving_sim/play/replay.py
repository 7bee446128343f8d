"""The JSON file of a recorded drive, from which the same tokens can be made again."""

import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from driving_sim.data.arrays import Floats32, Mask
from driving_sim.engine.config import Natural, Positive, config, from_dict, load_json, require
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, shown
from driving_sim.world_model.action_plan import ActionPlan
from driving_sim.world_model.rollout import Context
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import Frame
from driving_sim.world_model.world_model import WorldModel

FORMAT = "drivesim recorded drive 1"
_Number = Annotated[float, Field(ge=-1000, le=1000)]
_Action = tuple[_Number | None, _Number | None]
"""Speed in m/s and steering; None where unknown."""


@config
class Change:
    """Sampling settings that hold from the frame after this one on."""

    frame: Natural
    sampling: Sampling


@config
class Replay:
    """A recorded drive, from its start on. Frame 0 is the last frame of the context."""

    format: Literal["drivesim recorded drive 1"] = FORMAT  # type: ignore[assignment]
    model: str
    """Run folder of the model, or name of a packaged model."""
    fingerprint: str
    """SHA-256 of the model's weights, config and tokenizer."""
    precision: dict[str, str]
    """Number formats of the tokenizer and of the world model's passes."""
    fps: Positive
    start: str
    """Name of the start."""
    start_s: float
    """Time of frame 0 in its drive, in s."""
    context_tokens: tuple[tuple[tuple[Natural, ...], ...], ...]
    """[T, r, c]."""
    context_actions: tuple[_Action, ...]
    """The T - 1 actions between the frames of the context."""
    changes: Annotated[tuple[Change, ...], Field(min_length=1)]
    """The settings that the drive began with, at frame 0, and then each change."""
    rewinds: tuple[tuple[Natural, Natural], ...]
    """From which frame to which the driver went back. What was undone is in no other field."""
    first_frame: Natural
    """Frame of the drive that is the first frame of the video."""
    actions: tuple[_Action, ...]
    """The N actions; the first one leads from frame 0 to frame 1."""
    checksums: tuple[Natural, ...]
    """CRC-32 of the tokens (uint16, little endian) of each of the frames 1 to N."""

    def __post_init__(self) -> None:
        first, *later = (change.frame for change in self.changes)
        in_order = first == 0 and all(a < b for a, b in pairwise(later))
        require(self, "changes", in_order, "in the order of their frames, beginning with frame 0")
        count = len(self.actions)
        require(self, "checksums", len(self.checksums) == count, f"{count} numbers, one an action")

    @classmethod
    def load(cls, path: Path) -> "Replay":
        """Read the JSON file of a recorded drive. Raises DriveSimError if it is not one."""
        saved = load_json(path)
        if saved.get("format") != FORMAT:
            raise DriveSimError(
                f"{path}: not the JSON of a drive that `drivesim play` recorded (its format is "
                f"{shown(saved.get('format'))}); name the file beside the video"
            )
        replay = from_dict(cls, saved, str(path))
        if not replay.actions:
            raise DriveSimError(f"{path}: nothing was driven in it")
        return replay

    def context(self, world: WorldModel) -> Context:
        """Return the context. Raises DriveSimError if the drive was recorded with another model."""
        if world.fingerprint != self.fingerprint:
            raise DriveSimError(
                f"the drive was recorded with {self.model} of fingerprint {self.fingerprint[:12]}, "
                f"not with this model ({world.fingerprint[:12]}); name the model with `model`"
            )
        try:
            tokens = torch.tensor(self.context_tokens, dtype=torch.int64)
            if tokens.ndim != 3 or len(tokens) != len(self.context_actions) + 1:
                raise ValueError("T frames need T - 1 actions between them")
            frames = world.tokenizer.decode(tokens).numpy()
        except (ValueError, IndexError, RuntimeError) as error:
            raise DriveSimError(
                f"the recording's context tokens are not those of a context ({one_line(error)})"
            ) from error
        actions, valid = _arrays(self.context_actions)
        return Context(
            label=self.start,
            tokens=tokens,
            frames=frames,
            actions=actions,
            action_valid=valid,
            future=iter(()),
            start_s=self.start_s,
        )

    @property
    def plan(self) -> ActionPlan:
        """The actions as a plan."""
        actions, valid = _arrays(self.actions)
        return ActionPlan(label="replay", actions=actions, valid=valid)

    @property
    def first_sampling(self) -> Sampling:
        """The settings that frame 1 is drawn with."""
        return [change.sampling for change in self.changes if change.frame == 0][-1]

    def drive(self, world: WorldModel, context: Context) -> Iterator[Frame]:
        """Drive again from the recorded `context`; yield the frames 1 to N."""
        began, *later = self.changes
        settings = {change.frame: change.sampling for change in later}
        actions, valid = _arrays(self.actions)
        with world.drive(context, sampling=began.sampling, history_s=0) as session:
            for frame, (action, known) in enumerate(zip(actions, valid, strict=True)):
                session.sampling = settings.get(frame, session.sampling)
                yield session.step(action, known)


def _arrays(actions: Sequence[_Action]) -> tuple[Floats32, Mask]:
    """Return actions as float32 [N, 2], 0 where unknown, and whether they are known, [N, 2]."""
    values = np.array(actions, np.float32).reshape(-1, 2)  # None becomes NaN
    return np.nan_to_num(values), ~np.isnan(values)


def nullable(actions: Floats32, valid: Mask | None = None) -> tuple[_Action, ...]:
    """Return actions [N, 2] as they are written, with None where they are unknown or NaN."""
    known = ~np.isnan(actions) if valid is None else valid
    rows = zip(actions.tolist(), known.tolist(), strict=True)
    return tuple(
        (speed if has[0] else None, steering if has[1] else None) for (speed, steering), has in rows
    )


def checksum(tokens: Tensor) -> int:
    """Return the CRC-32 of a frame's tokens, as uint16 in little endian."""
    return zlib.crc32(tokens.cpu().numpy().astype("<u2").tobytes())
