"""Drives: frames with their times and, if they were recorded, actions.

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
    """Reads the frames of a drive. It can be pickled: it opens files only while it reads."""

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read a few frames [n, H, W, 3] in any order."""
        ...

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        """Yield frames [H, W, 3] in ascending order of their indices; None means all of them."""
        ...

    def files(self, indices: Ints) -> list[Path]:
        """Return the files that contain these frames; fingerprints hash them."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrames:
    """The frames of a video file, decoded in a separate process because the file may crash it."""

    facts: VideoFacts

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read a few frames [n, H, W, 3] in any order."""
        return read_frames(self.facts, indices, size)

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        """Yield frames [H, W, 3] in ascending order of their indices; None means all of them."""
        return stream_frames(self.facts, size=size, indices=indices)

    def files(self, indices: Ints) -> list[Path]:
        """Return the video file, for any frames."""
        return [self.facts.path]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drive:
    """One recording. It can be pickled: it opens its files only while frames are read."""

    id: str
    """Path below the folder that was searched, without suffix; unique among the drives."""
    source: str
    """Layout of its files: video, udacity or comma2k19."""
    timestamps: Floats
    """[N] Time of each frame in seconds from the first one, strictly increasing."""
    reader: FrameReader
    log: ActionLog | None = None
    """Actions on the same clock, or None if there are none."""
    video: VideoFacts | None = None
    """Facts of the video file, or None if the frames do not come from a video."""

    def frames(self, indices: Ints | Sequence[int], size: FrameSize | None = None) -> Pixels:
        """Read a few frames, uint8 [n, H, W, 3], in any order. For whole drives use `stream`."""
        return self.reader.read(np.asarray(indices, np.int64), size)

    def stream(
        self, size: FrameSize | None = None, indices: Ints | Sequence[int] | None = None
    ) -> Iterator[Pixels]:
        """Yield the frames at ascending `indices`, or all frames, as uint8 [H, W, 3]."""
        numbers = None if indices is None else np.asarray(indices, np.int64)
        return self.reader.stream(numbers, size)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledDrive:
    """The frames of a drive that a model sees, each with the action that leads to the next one."""

    drive: Drive
    indices: Ints
    """[T] Ascending numbers of the frames in the drive."""
    timestamps: Floats
    """[T] Time of each frame in seconds from the drive's first frame."""
    actions: Floats32
    """[T, 2] Speed in m/s and steering, averaged from each frame to the next; 0 where invalid."""
    action_valid: Mask
    """[T, 2] Whether each speed and each steering is known."""
    segments: list[tuple[int, int]]
    """Ranges [start, stop) of T within which the drive has no gap."""

    @property
    def fps(self) -> float:
        """Mean frame rate within the segments; 0 if none has two frames."""
        return mean_rate(self.timestamps, self.segments)

    def batches(self, size: FrameSize, count: int) -> Iterator[Pixels]:
        """Yield the frames in order, `count` at a time (or what is left), as uint8 [n, H, W, 3]."""
        stream = self.drive.stream(size, self.indices)
        while batch := list(islice(stream, count)):
            yield np.stack(batch)


def sample(drive: Drive, *, fps: float | None = None, every: int | None = None) -> SampledDrive:
    """Choose frames of a drive at a rate or a stride, then average the actions between them.

    Without `fps` and `every`, all frames are chosen. Raises ValueError as `choose_frames` does.
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
    """Something that looks like a drive but cannot be used."""

    id: str
    """Id that the drive would have."""
    reason: str
    """Why it cannot be used, in one line."""


@dataclass(frozen=True, slots=True)
class DriveSet:
    """The drives that were found, in the order of their ids, and what was skipped and why."""

    drives: list[Drive]
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """Assumptions made while reading action files: one line each, with the drives concerned."""
        drives_by_line: dict[str, list[str]] = {}
        for drive in self.drives:
            for line in drive.log.notices if drive.log else ():
                drives_by_line.setdefault(line, []).append(drive.id)
        return [
            f"{line} ({drives[0]}{f' and {len(drives) - 1} more' if drives[1:] else ''})"
            for line, drives in drives_by_line.items()
        ]

    @property
    def steering_kind(self) -> SteeringKind | None:
        """Kind of steering in all drives; None if no drive has steering.

        Raises DriveSimError if drives have different kinds, because a model can learn only one.
        """
        first: dict[SteeringKind, str] = {}
        for drive in self.drives:
            if drive.log is not None and drive.log.steering_kind and drive.log.has[STEERING]:
                first.setdefault(drive.log.steering_kind, drive.id)
        if len(first) > 1:
            kinds = ", ".join(f"{kind} ({drive})" for kind, drive in first.items())
            raise DriveSimError(
                f"the drives mix kinds of steering: {kinds}; use drives of one kind only"
            )
        return next(iter(first), None)

    def require_all(self) -> "DriveSet":
        """Return this set, or raise BadDriveError if anything was skipped."""
        if self.skipped:
            first, others = self.skipped[0], len(self.skipped) - 1
            more = f" (and {others} more)" if others else ""
            raise BadDriveError(f"{first.reason}{more}; repair or remove it")
        return self
