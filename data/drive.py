"""Drives: frames with their times and, if they were recorded, actions.

Legend: N frames of a drive, T frames sampled from it.
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
    """Reads the frames of a drive. It can be pickled because it opens files only while reading."""

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read the frames at `indices`, which may be in any order, as [n, H, W, 3]."""
        ...

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        """Yield the frames [H, W, 3] at ascending `indices`, or all frames if `indices` is None."""
        ...

    def files(self, indices: Ints) -> list[Path]:
        """Return the files that contain the frames at `indices`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrames:
    """Reads a video file's frames in another process, because a bad file can crash the decoder."""

    facts: VideoFacts

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read the frames at `indices`, which may be in any order, as [n, H, W, 3]."""
        return read_frames(self.facts, indices, size)

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        """Yield the frames [H, W, 3] at ascending `indices`, or all frames if `indices` is None."""
        return stream_frames(self.facts, size=size, indices=indices)

    def files(self, indices: Ints) -> list[Path]:
        """Return the video file, which contains all the frames."""
        return [self.facts.path]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drive:
    """One recording. It can be pickled because it opens its files only while reading frames."""

    id: str
    """Path relative to the searched folder, without suffix. No two drives have the same id."""
    source: str
    """Layout of the recording's files: video, udacity or comma2k19."""
    timestamps: Floats
    """[N] Time of each frame in seconds since the first frame, strictly increasing."""
    reader: FrameReader
    log: ActionLog | None = None
    """Actions, timed on the same clock as the frames, or None if none were recorded."""
    video: VideoFacts | None = None
    """Facts about the video file, or None if the frames do not come from a video."""

    def frames(self, indices: Ints | Sequence[int], size: FrameSize | None = None) -> Pixels:
        """Read the frames at `indices`, which may be in any order, as uint8 [n, H, W, 3].

        To read a whole drive, use `stream`, which yields one frame at a time.
        """
        return self.reader.read(np.asarray(indices, np.int64), size)

    def stream(
        self, size: FrameSize | None = None, indices: Ints | Sequence[int] | None = None
    ) -> Iterator[Pixels]:
        """Yield the frames at ascending `indices`, or all frames, as uint8 [H, W, 3]."""
        numbers = None if indices is None else np.asarray(indices, np.int64)
        return self.reader.stream(numbers, size)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledDrive:
    """Frames chosen from a drive, with the mean action between each frame and the next."""

    drive: Drive
    indices: Ints
    """[T] Indices of the chosen frames in the drive, ascending."""
    timestamps: Floats
    """[T] Time of each chosen frame in seconds since the drive's first frame."""
    actions: Floats32
    """[T, 2] Mean speed in m/s and mean steering from each frame to the next; 0 if unknown."""
    action_valid: Mask
    """[T, 2] Whether the speed and the steering in `actions` are known."""
    segments: list[tuple[int, int]]
    """Ranges [start, stop) of the T frames, cut at the gaps of the drive."""

    @property
    def fps(self) -> float:
        """Mean frame rate within the segments, or 0 if no segment has two frames."""
        return mean_rate(self.timestamps, self.segments)

    def batches(self, size: FrameSize, count: int) -> Iterator[Pixels]:
        """Yield batches of `count` frames in order, uint8 [n, H, W, 3]; the last may be smaller."""
        stream = self.drive.stream(size, self.indices)
        while batch := list(islice(stream, count)):
            yield np.stack(batch)


def sample(drive: Drive, *, fps: float | None = None, every: int | None = None) -> SampledDrive:
    """Choose frames of a drive at rate `fps` or stride `every`; average the actions between them.

    Without `fps` and `every`, all frames are chosen. Raises ValueError if both are given, or if one
    is not positive.
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
    """The drives that were found, sorted by id, and those that were skipped."""

    drives: list[Drive]
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """One line for each assumption made while reading action files, with the drives' ids."""
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
        """Kind of steering of the drives, or None if no drive has steering.

        Raises DriveSimError if the drives have different kinds: a model can learn only one kind.
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
            first, count = self.skipped[0], len(self.skipped)
            more = f" (the first of {count} bad drives)" if count > 1 else ""
            raise BadDriveError(f"{first.reason}{more}; repair or remove it")
        return self
