"""Drives: frames with their times and, if they were recorded, actions.

Legend: N frames of a drive, T frames sampled from it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from driving_sim.data.actions.action_log import ActionLog, SteeringKind
from driving_sim.data.actions.alignment import align
from driving_sim.data.arrays import Floats, Floats32, Ints, Mask, Pixels
from driving_sim.data.video.decoder_pool import read_frames, stream_frames
from driving_sim.data.video.file_facts import VideoFacts
from driving_sim.data.video.frame_rate import Choice, choose_frames, mean_rate
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.segments import cut, isolated, within_segments
from driving_sim.engine.config import config
from driving_sim.engine.errors import BadDriveError, DriveSimError

_RUN_S = 1.0
_RATE_SLACK = 0.05
_STRETCHES_NAMED = 4


class FrameReader(Protocol):
    """Reads the frames of a drive. It can be pickled because it opens files only while reading."""

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        """Read the frames at `indices`, which may be in any order, as [n, H, W, 3]."""
        ...

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels | None]:
        """Yield the frames [H, W, 3] at ascending `indices`, or all frames if `indices` is None.

        A frame that is lost to damage is None.
        """
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

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels | None]:
        """Yield the frames [H, W, 3] at ascending `indices`, or all frames if `indices` is None. A
        frame that is lost to damage is None."""
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
    """Layout of the recording's files, such as video, udacity or pictures."""
    timestamps: Floats
    """[N] Time of each frame in seconds since the first frame, strictly increasing."""
    reader: FrameReader
    log: ActionLog | None = None
    """Actions, timed on the same clock as the frames, or None if none were recorded."""
    video: VideoFacts | None = None
    """Facts about the video file, or None if the frames do not come from a video."""
    wheelbase_m: float | None = None
    """Distance between the axles in metres, or None if it is unknown."""
    assumptions: tuple[str, ...] = ()
    """What was assumed, left out or guessed while finding the drive, one line each."""

    @property
    def duration_s(self) -> float:
        """Time from the first frame to the last in seconds."""
        return float(self.timestamps[-1] - self.timestamps[0])

    @property
    def notices(self) -> tuple[str, ...]:
        """What was assumed, left out or guessed about the drive and its actions, a line each."""
        return (
            *self.assumptions,
            *(self.video.notices if self.video else ()),
            *(self.log.notices if self.log else ()),
        )

    def frames(self, indices: Ints | Sequence[int], size: FrameSize | None = None) -> Pixels:
        """Read the frames at `indices`, which may be in any order, as uint8 [n, H, W, 3].

        To read a whole drive, use `stream`, which yields one frame at a time.
        """
        return self.reader.read(np.asarray(indices, np.int64), size)

    def stream(
        self, size: FrameSize | None = None, indices: Ints | Sequence[int] | None = None
    ) -> Iterator[Pixels]:
        """Yield the frames at ascending `indices`, or all frames, as uint8 [H, W, 3].

        Raises BadDriveError at a frame that is lost to damage.
        """
        for number, frame in enumerate(self.stream_with_losses(size, indices)):
            if frame is None:
                at_s = self.timestamps[number if indices is None else indices[number]]
                raise BadDriveError(
                    f"{self.id}: is damaged at {at_s:.1f} s; leave this part out, or the drive"
                )
            yield frame

    def stream_with_losses(
        self, size: FrameSize | None = None, indices: Ints | Sequence[int] | None = None
    ) -> Iterator[Pixels | None]:
        """Yield the frames as `stream` does, but None for each that is lost to damage."""
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
    """Ranges [start, stop) of the T frames, cut at the gaps."""
    notices: tuple[str, ...] = ()
    """What the frame rate that was asked for means for this drive, one line each."""

    @property
    def fps(self) -> float:
        """Mean frame rate within the segments, or 0 if no segment has two frames."""
        return mean_rate(self.timestamps, self.segments)

    @property
    def usable_share(self) -> float:
        """Share of the drive's time that lies in runs of at least 1 s without a gap."""
        runs = [
            float(self.timestamps[stop - 1] - self.timestamps[start])
            for start, stop in self.segments
        ]
        whole = self.drive.duration_s
        return sum(run for run in runs if run >= _RUN_S) / whole if whole else 0.0

    def without(self, lost: Mask) -> "SampledDrive":
        """Return the drive without the frames [T] that are lost to damage, cut where they were."""
        if not lost.any():
            return self
        kept = np.flatnonzero(~lost)
        gap_after = ~within_segments(isolated(self.segments, lost))
        gaps_before = np.append(0, np.cumsum(gap_after))
        return replace(
            self,
            indices=self.indices[kept],
            timestamps=self.timestamps[kept],
            actions=self.actions[kept],
            action_valid=self.action_valid[kept],
            segments=cut(len(kept), np.diff(gaps_before[kept]) > 0),
        )

    def about_losses(self, lost: Mask) -> tuple[str, ...]:
        """Return a notice about the frames [T] that are lost to damage, if there are any."""
        if not lost.any():
            return ()
        bounds = np.flatnonzero(np.diff(np.concatenate([[False], lost, [False]]))).tolist()
        stretches = [
            f"{self.timestamps[start]:.2f} to {self.timestamps[stop - 1]:.2f} s"
            if stop > start + 1
            else f"{self.timestamps[start]:.2f} s"
            for start, stop in zip(bounds[::2], bounds[1::2], strict=True)
        ]
        more = len(stretches) - _STRETCHES_NAMED
        named = ", ".join(stretches[:_STRETCHES_NAMED]) + (f" and {more} more" if more > 0 else "")
        frames = f"{lost.sum()} frames there are" if lost.sum() > 1 else "frame there is"
        return (f"damaged at {named}; the {frames} left out",)

    def batches(self, size: FrameSize, count: int) -> Iterator[Pixels]:
        """Yield batches of `count` frames in order, uint8 [n, H, W, 3]; the last may be smaller."""
        stream = self.drive.stream(size, self.indices)
        while batch := list(islice(stream, count)):
            yield np.stack(batch)


def check_rate(fps: float | None, every: int | None) -> None:
    """Raise DriveSimError if both are given, or if `fps` is not a finite number above 0."""
    if fps is not None and every is not None:
        raise DriveSimError("`fps` and `every` are both given; give only one")
    if fps is not None and not 0 < fps < math.inf:
        raise DriveSimError(f"`fps` {fps:g}: give a finite rate above 0 frames/s")


def sample(drive: Drive, *, fps: float | None = None, every: int | None = None) -> SampledDrive:
    """Choose frames of a drive at rate `fps` or stride `every`; average the actions between them.

    Without `fps` and `every`, all frames are chosen. Raises ValueError if both are given, or if one
    is not positive.
    """
    choice = choose_frames(drive.timestamps, fps=fps, every=every)
    timestamps = drive.timestamps[choice.indices]
    actions, action_valid = align(drive.log, timestamps)
    return SampledDrive(
        drive=drive,
        indices=choice.indices,
        timestamps=timestamps,
        actions=actions,
        action_valid=action_valid,
        segments=choice.segments,
        notices=tuple(_about_rate(drive.timestamps, choice, fps)),
    )


def _about_rate(timestamps: Floats, choice: Choice, fps: float | None) -> Iterator[str]:
    """Yield a line for each way in which the chosen frames are not what the user may expect."""
    chosen = timestamps[choice.indices]
    rate = mean_rate(chosen, choice.segments)
    if fps is not None and choice.on_ticks:
        own = mean_rate(timestamps, choose_frames(timestamps).segments)
        yield f"its {own:.3g} frames/s are resampled to {fps:g}: the frames nearest to each tick"
    elif fps is not None and rate and abs(rate / fps - 1) > _RATE_SLACK:
        stride = int(np.diff(choice.indices).min())
        taken = "all its frames are" if stride == 1 else f"one of {stride} frames is"
        yield (
            f"{taken} taken, which makes {rate:.3g} frames/s, not the {fps:g} asked for: a step "
            f"from one to the next is {1 / rate:.3g} s"
        )
    if len(choice.segments) > 1:
        lost = sum(float(chosen[start] - chosen[start - 1]) for start, _ in choice.segments[1:])
        count = len(choice.segments) - 1
        yield f"{count} gap{'s' * (count > 1)} without frames at this rate, {lost:.1f} s in all"


@config
class Skipped:
    """Something that looks like a drive but cannot be used."""

    id: str
    """Id that the drive would have."""
    reason: str
    """Why it cannot be used, in one line."""


def grouped(notices: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Return the lines of several drives, given with their ids, so that equal lines are one."""
    drives_by_line: dict[str, list[str]] = {}
    for drive_id, lines in notices:
        for line in lines:
            drives_by_line.setdefault(line, []).append(drive_id)
    return [
        f"{line} ({drives[0]}{f' and {len(drives) - 1} more' if drives[1:] else ''})"
        for line, drives in drives_by_line.items()
    ]


@dataclass(frozen=True, slots=True)
class DriveSet:
    """The drives that were found, sorted by id, and those that were skipped."""

    drives: list[Drive]
    skipped: list[Skipped] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    """What was left out of the searched folders, one line each."""

    @property
    def notices(self) -> list[str]:
        """One line for everything that was assumed, left out or guessed, with the drives' ids."""
        return [*grouped((drive.id, drive.notices) for drive in self.drives), *self.passed_over]

    @property
    def steering_kind(self) -> SteeringKind | None:
        """Kind of steering of the drives, or None if no drive has steering.

        Raises DriveSimError if the drives have different kinds: a model can learn only one kind.
        """
        first: dict[SteeringKind, str] = {}
        for drive in self.drives:
            if drive.log is not None and drive.log.steering_kind:
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
