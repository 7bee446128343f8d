"""Read a folder of true futures, as any simulator can make it.

FOLDER/START/context.mp4, context.csv   the drive until the start
FOLDER/START/NAME.mp4, NAME.csv         what truly follows under the actions in the CSV

The first frame of a future is the last one of its context. All futures are equally long, and every
start has the same names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from driving_sim.data.actions.action_log import STEERING
from driving_sim.data.actions.alignment import align
from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.arrays import Floats32, Mask, Pixels
from driving_sim.data.drive import Drive, SampledDrive
from driving_sim.data.video.frame_rate import choose_frames
from driving_sim.engine.errors import DriveSimError
from driving_sim.tokenizer.metrics import psnr
from driving_sim.world_model.contexts import find_for
from driving_sim.world_model.rollout import sample_for
from driving_sim.world_model.world_model import WorldModel

CONTEXT = "context"
LEAST_S = 1.5
"""Minimum length of a future in s."""
_RATE_TOLERANCE = 0.02
_SAME_DB = 25.0
"""PSNR in dB above which the first frame of a future may be the last one of its context.

The two are encoded separately, so they are never quite the same.
"""
_LAYOUT = (
    "each start is a folder with context.mp4, context.csv, and a video and a CSV for each of two "
    "or more futures, such as left.mp4 and left.csv"
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Start:
    """A moment of a drive, and several futures that truly follow it, each under its own actions."""

    name: str
    context: SampledDrive
    """As many frames as the model can use. The last one is the moment of the start."""
    futures: Mapping[str, SampledDrive]
    """The futures by name, sorted. Their first frame is the moment of the start."""

    @property
    def frames(self) -> int:
        """Number of frames of a future, N, without the moment of the start."""
        return len(next(iter(self.futures.values())).indices) - 1

    @property
    def actions(self) -> tuple[Floats32, Mask]:
        """The actions that lead to the frames of each future, and their validity [K, N, 2]."""
        of_futures = self.futures.values()
        actions = np.stack([future.actions[:-1] for future in of_futures])
        return actions, np.stack([future.action_valid[:-1] for future in of_futures])


def find_starts(world: WorldModel, folder: Path, reading: Reading = AS_NAMED) -> list[Start]:
    """Find the starts in a folder, sorted by name, and sample their videos as the model expects.

    Raises DriveSimError if the layout is wrong, if a video or CSV cannot be read or does not fit
    the model, or if a future does not begin where its context ends.
    """
    if not any(world.known_channels):
        raise DriveSimError(
            "the model learned no actions, so it cannot know one future from another; name a model "
            "that was trained with actions"
        )
    by_start: dict[str, dict[str, Drive]] = {}
    for drive in find_for(world, [folder], reading).drives:
        place = PurePosixPath(drive.id)
        of_start = by_start.setdefault(str(place.parent), {})
        name = place.name if drive.video is None else Path(drive.video.path).stem
        if name in of_start:
            raise DriveSimError(f"{folder / place.parent}: has two videos {name!r}; remove one")
        of_start[name] = drive
    starts = [_start(world, folder, name, drives) for name, drives in sorted(by_start.items())]
    _check_alike(starts)
    for future in _futures(starts):
        if abs(future.fps / world.fps - 1) > _RATE_TOLERANCE:
            raise DriveSimError(
                f"{future.drive.id}: has {future.fps:.3g} frames/s, but the model {world.fps:.3g}; "
                "record the futures at the model's rate, or at a higher one"
            )
    for start in starts:
        _check_beginnings(world, start)
    return starts


def read(world: WorldModel, drive: SampledDrive) -> Pixels:
    """Return the sampled frames of a drive, uint8 [T, H, W, 3], at the tokenizer's size."""
    return np.stack([*drive.drive.stream(world.tokenizer.frame_size, drive.indices)])


def _start(world: WorldModel, folder: Path, place: str, drives: Mapping[str, Drive]) -> Start:
    here = folder if place == "." else folder / place
    names = sorted(drives.keys() - {CONTEXT})
    if CONTEXT not in drives or len(names) < 2:
        lack = "no context" if CONTEXT not in drives else f"{len(names)} futures"
        raise DriveSimError(f"{here}: {lack}; {_LAYOUT}")
    for file, drive in drives.items():
        if drive.log is None:
            raise DriveSimError(
                f"{here / file}.csv: no such file; write the speed and steering of the video there"
            )
    futures = {name: _without_gap(sample_for(world, drives[name])) for name in names}
    for future in futures.values():
        _check_actions(world, future)
    context = _until_the_end(world, drives[CONTEXT])
    return Start(name=here.name if place == "." else place, context=context, futures=futures)


def _without_gap(drive: SampledDrive) -> SampledDrive:
    if len(drive.segments) > 1:
        raise DriveSimError(
            f"{drive.drive.id}: has a gap without frames; make a video without a gap"
        )
    return drive


def _until_the_end(world: WorldModel, drive: Drive) -> SampledDrive:
    """Sample a context so that its last frame is chosen, and keep what the model can use of it."""
    sampled, times = sample_for(world, drive), drive.timestamps
    # At a lower rate than the video's, the choice depends on the first frame.
    for first in range(len(times)):
        choice = choose_frames(times[first:], fps=world.fps)
        if first + choice.indices[-1] == len(times) - 1:
            break
    begin, stop = choice.segments[-1]
    if stop - begin < world.context_frames:
        raise DriveSimError(
            f"{drive.id}: has {stop - begin} frames without a gap at the model's {world.fps:.3g} "
            f"frames/s, but the model uses {world.context_frames}; make a longer context"
        )
    indices = (first + choice.indices)[-world.context_frames :]
    actions, valid = align(sampled.drive.log, times[indices])
    return replace(
        sampled,
        indices=indices,
        timestamps=times[indices],
        actions=actions,
        action_valid=valid,
        segments=[(0, len(indices))],
    )


def _check_actions(world: WorldModel, drive: SampledDrive) -> None:
    unknown = ~drive.action_valid[:-1] & world.known_channels
    if unknown.any():
        frame, channel = np.argwhere(unknown)[0]
        what = "steering" if channel == STEERING else "speed"
        raise DriveSimError(
            f"{drive.drive.id}: its CSV does not give the {what} at "
            f"{drive.timestamps[frame]:.1f} s; give it for the whole video"
        )


def _check_alike(starts: Sequence[Start]) -> None:
    """Raise DriveSimError if the futures differ in names or in length, or if they are too short."""
    first = starts[0]
    for start in starts:
        if start.futures.keys() != first.futures.keys():
            name = min(start.futures.keys() ^ first.futures.keys())
            has, lacks = (first, start) if name in first.futures else (start, first)
            raise DriveSimError(
                f"{lacks.name}: lacks the future {name!r}, which {has.name} has; give every start "
                "the same futures"
            )
    lengths = {future.drive.id: len(future.indices) for future in _futures(starts)}
    (whose, frames), *_ = lengths.items()
    for drive, other in lengths.items():
        if other != frames:
            raise DriveSimError(
                f"{drive}: has {other} frames, but {whose} has {frames}; make all futures equally "
                "long"
            )
    seconds = float(next(_futures(starts)).timestamps[-1])
    if round(seconds, 3) < LEAST_S:
        raise DriveSimError(
            f"the futures last {seconds:.2g} s; make them at least {LEAST_S:g} s long"
        )


def _futures(starts: Sequence[Start]) -> Iterator[SampledDrive]:
    return (future for start in starts for future in start.futures.values())


def _check_beginnings(world: WorldModel, start: Start) -> None:
    """Raise DriveSimError if a future does not begin with the last frame of its context."""
    size = world.tokenizer.frame_size
    now = torch.from_numpy(start.context.drive.frames(start.context.indices[-1:], size))
    for future in start.futures.values():
        first = torch.from_numpy(future.drive.frames(future.indices[:1], size))
        alike_db = float(psnr(first, now))
        if alike_db < _SAME_DB:
            raise DriveSimError(
                f"{future.drive.id}: its first frame is not the last one of its context (PSNR "
                f"{alike_db:.1f} dB); begin every future with that frame"
            )
