"""Drives: frames with their times and, where there are any, the actions.

Legend: N frames of a drive, T frames of a sample of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from driving_sim.data.actions.action_file import STEERING, ActionLog, SteeringKind
from driving_sim.data.actions.alignment import align
from driving_sim.data.arrays import Floats, Floats32, Ints, Mask, Pixels
from driving_sim.data.video.decoder_pool import read_frames, stream_frames
from driving_sim.data.video.file_facts import VideoFacts
from driving_sim.data.video.frame_rate import choose_frames, mean_rate
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.segments import chosen_segments
from driving_sim.engine.config import config
from driving_sim.engine.errors import BadDriveError, DriveSimError


class FrameReader(Protocol):
    """Reads a drive's frames; picklable, opens files only while reading."""

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read a few frames [n, H, W, 3] in any order."""
        ...

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        """Yield frames [H, W, 3] in ascending order of their indices; None means all of them."""
        ...

    def files(self, indices: Ints) -> list[Path]:
        """The files that these frames are read from: a fingerprint hashes them."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrames:
    """The frames of a video file, decoded in a process that it cannot take down with it."""

    facts: VideoFacts

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read a few frames [n, H, W, 3] in any order."""
        return read_frames(self.facts, indices, size)

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        """Yield frames [H, W, 3] in ascending order of their indices; None means all of them."""
        return stream_frames(self.facts, size=size, indices=indices)

    def files(self, indices: Ints) -> list[Path]:
        """The video's file, whichever frames are meant."""
        return [self.facts.path]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drive:
    """One recording; picklable, it opens its files only while frames are read."""

    id: str
    """Its path below the folder that was searched, without suffix; unique among the drives."""
    source: str
    """The layout it was found in: video, udacity or comma2k19."""
    timestamps: Floats
    """[N] s from the first frame, strictly increasing."""
    reader: FrameReader
    log: ActionLog | None = None
    """The actions on the same clock, where there are any."""
    video: VideoFacts | None = None
    """The facts of its file, where the frames come from a video."""

    def frames(self, indices: Ints | Sequence[int], size: FrameSize | None = None) -> Pixels:
        """Read a few frames, uint8 [n, H, W, 3], in any order; for whole drives use `stream`."""
        return self.reader.read(np.asarray(indices, np.int64), size)

    def stream(
        self, size: FrameSize | None = None, indices: Ints | Sequence[int] | None = None
    ) -> Iterator[Pixels]:
        """Yield frames, uint8 [H, W, 3], in order: those at ascending `indices`, or all."""
        wanted = None if indices is None else np.asarray(indices, np.int64)
        return self.reader.stream(wanted, size)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledDrive:
    """The frames of a drive that a model sees, with the action that leads from each to the next."""

    drive: Drive
    indices: Ints
    """[T] frames of the drive, ascending."""
    timestamps: Floats
    """[T] s from the drive's first frame."""
    actions: Floats32
    """[T, 2] speed in m/s and steering, the mean from each frame to the next; 0 where invalid."""
    action_valid: Mask
    """[T, 2] where the actions are known."""
    segments: list[tuple[int, int]]
    """Ranges [start, stop) of T with no gap in the drive's own frames between them."""

    @property
    def fps(self) -> float:
        """Mean rate within the segments; 0 where none has two frames."""
        return mean_rate(self.timestamps, self.segments)

    def batches(self, size: FrameSize, count: int) -> Iterator[Pixels]:
        """Yield its frames in order, uint8 [n, H, W, 3], n = `count` but for the last."""
        stream = self.drive.stream(size, self.indices)
        while batch := list(islice(stream, count)):
            yield np.stack(batch)


def sample(drive: Drive, *, fps: float | None = None, every: int | None = None) -> SampledDrive:
    """Choose a drive's frames at a rate or a stride, then average the actions between them.

    Neither `fps` nor `every` means every frame. Raises ValueError as `choose_frames` does.
    """
    indices = choose_frames(drive.timestamps, fps=fps, every=every)
    timestamps = drive.timestamps[indices]
    actions, action_valid = align(drive.log, timestamps)
    return SampledDrive(
        drive=drive,
        indices=indices,
        timestamps=timestamps,
        actions=actions,
        action_valid=action_valid,
        segments=chosen_segments(drive.timestamps, indices),
    )


@config
class Skipped:
    """Something that looked like a drive and cannot be used."""

    id: str
    """The drive's id."""
    reason: str
    """Why, in one line."""


@dataclass(frozen=True, slots=True)
class DriveSet:
    """The drives that were found, in the order of their ids, and what was left out and why."""

    drives: list[Drive]
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """What was assumed while reading the action files, one line each with the drives it met."""
        met: dict[str, list[str]] = {}
        for drive in self.drives:
            for line in drive.log.notices if drive.log else ():
                met.setdefault(line, []).append(drive.id)
        return [
            f"{line} ({drives[0]}{f' and {len(drives) - 1} more' if drives[1:] else ''})"
            for line, drives in met.items()
        ]

    @property
    def steering_kind(self) -> SteeringKind | None:
        """What all their steering measures, None where no drive has any.

        Raises DriveSimError where kinds are mixed: a model learns from one of them only.
        """
        first: dict[SteeringKind, str] = {}
        for drive in self.drives:
            if drive.log is not None and drive.log.steering_kind and drive.log.has[STEERING]:
                first.setdefault(drive.log.steering_kind, drive.id)
        if len(first) > 1:
            found = ", ".join(f"{kind} ({drive})" for kind, drive in first.items())
            raise DriveSimError(
                f"the drives mix kinds of steering: {found}; use one kind at a time"
            )
        return next(iter(first), None)

    def require_all(self) -> "DriveSet":
        """Return the set itself; raises BadDriveError where anything was skipped."""
        if self.skipped:
            first, others = self.skipped[0], len(self.skipped) - 1
            more = f" (and {others} more)" if others else ""
            raise BadDriveError(f"{first.reason}{more}; repair or remove it")
        return self
