"""Inspect drives: report what they contain and what is wrong with them (`drivesim inspect`)."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.arrays import Floats32, Mask, Pixels
from driving_sim.data.drive import Drive, SampledDrive, Skipped, check_rate, grouped, sample
from driving_sim.data.inspect.motion import Motion, measure_motion, picture_change
from driving_sim.data.inspect.picture import draw_drive
from driving_sim.data.inspect.report import DriveReport, Report
from driving_sim.data.inspect.steering_check import measure_synchrony
from driving_sim.data.inspect.turns import assumptions
from driving_sim.data.inspect.view import View
from driving_sim.data.sources import find_drives
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.segments import within_segments
from driving_sim.engine.errors import BadDriveError, DriveSimError
from driving_sim.engine.files import atomic_folder
from driving_sim.engine.progress import Progress, progress
from driving_sim.engine.run_folder import check_replaceable

# `motion` scales frames down to this size anyway, and decoding larger frames takes longer.
_SIZE = FrameSize(height=64, width=128)
_MEASURED_S = 300.0
_FRAMES_AT_ONCE = 256
_FASTEST_MPS = 60.0
_STANDING_MPS, _DRIVING_MPS = 0.3, 3.0
_FEW_FRAMES = 10
_REPORT = "inspection.json"
# Bytes of a picture's name before its suffix. File systems allow 255 for all of it.
_LONGEST_NAME = 200
_VIDEO = "{0.codec} in {0.container}, {0.width}x{0.height}, read by {0.reader}"


def _measure(sampled: SampledDrive, bar: Progress) -> tuple[Mask, Motion, Floats32]:
    """Return which of a drive's frames [N] are lost to damage, and the `Motion` and the
    `picture_change` between the T others, [T - 1] each."""
    measured = [np.zeros((4, 0), np.float32)]
    lost = np.zeros(len(sampled.indices), np.bool_)
    frames = _intact(sampled, lost)
    block = list(islice(frames, _FRAMES_AT_ONCE))
    while len(block) > 1:
        pictures = np.stack(block)
        measured.append(np.stack([*measure_motion(pictures), picture_change(pictures)]))
        bar.advance(len(block) - 1)
        # Begin each block with the last frame of the previous block, because motion is measured
        # between pairs of frames.
        block = [block[-1], *islice(frames, _FRAMES_AT_ONCE - 1)]
    bar.advance(1)
    *motion, change = np.concatenate(measured, axis=1)
    return lost, Motion(*motion), change


def _intact(sampled: SampledDrive, lost: Mask) -> Iterator[Pixels]:
    """Yield the frames of a drive that are not damaged, and mark the others in `lost` [N]."""
    frames = sampled.drive.stream_with_losses(_SIZE, sampled.indices)
    for number, frame in enumerate(frames):
        if frame is None:
            lost[number] = True
        else:
            yield frame
    if lost.all():
        raise BadDriveError(f"{sampled.drive.id}: all its frames are damaged; leave it out")


def _speed_problems(sampled: SampledDrive, change: Floats32) -> list[str]:
    """Return messages if the speed is too high for a car, or is 0 although the picture moves."""
    speed, known = sampled.actions[:, SPEED], sampled.action_valid[:, SPEED]
    problems = []
    if known.any() and speed[known].max() > _FASTEST_MPS:
        problems.append(
            f"the speed reaches {speed[known].max():.0f} m/s ({speed[known].max() * 3.6:.0f} km/h):"
            " if the column is in km/h or mph, rename it to speed_kmh or speed_mph"
        )
    usable = known[:-1] & within_segments(sampled.segments)
    standing = change[usable & (np.abs(speed[:-1]) < _STANDING_MPS)]
    driving = change[usable & (np.abs(speed[:-1]) > _DRIVING_MPS)]
    if min(len(standing), len(driving)) >= _FEW_FRAMES and np.median(standing) > np.median(driving):
        problems.append(
            "the picture changes more while the speed is 0 than while the car drives: "
            "check that the actions belong to this video"
        )
    return problems


def _value_range(sampled: SampledDrive, channel: int) -> tuple[float, float] | None:
    """Return the 1st and 99th percentile of a channel's known values, or None if there are none."""
    values = sampled.actions[sampled.action_valid[:, channel], channel]
    if not len(values):
        return None
    low, high = np.percentile(values, (1, 99)).tolist()
    return low, high


def _caption(problems: Sequence[str]) -> str:
    """Return the problems without their remedies, which come after a colon or a semicolon."""
    return "; ".join(re.split("[:;] ", line)[0] for line in problems) or "no problems found"


def picture_name(drive_id: str) -> str:
    """Return the path of a drive's PNG in the output folder.

    It is the drive's id with a suffix, shortened if a file system would refuse such a long name.
    """
    folder, slash, name = drive_id.rpartition("/")
    if len(os.fsencode(name)) > _LONGEST_NAME:
        kept = os.fsencode(name)[:_LONGEST_NAME].decode("utf-8", "ignore")
        name = f"{kept}-{hashlib.sha256(os.fsencode(drive_id)).hexdigest()[:8]}"
    return f"{folder}{slash}{name}.png"


def _draw(
    out: Path, measured: SampledDrive, motion: Motion, problems: Sequence[str]
) -> tuple[str | None, tuple[str, ...]]:
    """Draw a drive into the folder `out`. Return the name of the picture, or why there is none.

    Raises DriveSimError if the disk is full or may not be written.
    """
    drive_id = measured.drive.id
    picture = picture_name(drive_id)
    seen = np.where(within_segments(measured.segments), motion.sideways, np.nan)
    try:
        (out / picture).parent.mkdir(parents=True, exist_ok=True)
        draw_drive(out / picture, measured, seen, f"{drive_id}: {_caption(problems)}")
    except OSError as error:
        return None, (f"its picture cannot be written: {error.strerror or error}",)
    return picture, ()


def _report(
    drive: Drive,
    decoded: SampledDrive,
    lost: Mask,
    motion: Motion,
    change: Floats32,
    out: Path,
    rate: dict[str, Any],
) -> DriveReport:
    """Report on a drive, of which the frames `decoded` [N] were decoded and `lost` [N] damaged."""
    measured = decoded.without(lost)
    all_frames, chosen = sample(drive), sample(drive, **rate)
    view = View.judge(motion, within_segments(measured.segments))
    synchrony = measure_synchrony(motion.sideways, measured, view)
    problems = (*synchrony.problems, *_speed_problems(measured, change))
    gap_lengths = np.diff(chosen.timestamps)[~within_segments(chosen.segments)]
    picture, missing = _draw(out, measured, motion, problems)
    return DriveReport(
        id=drive.id,
        source=drive.source,
        frames=len(drive.timestamps),
        duration_s=drive.duration_s,
        fps=all_frames.fps,
        gaps=len(gap_lengths),
        longest_gap_s=float(gap_lengths.max(initial=0.0)),
        usable_share=chosen.usable_share if rate else None,
        video=None if drive.video is None else _VIDEO.format(drive.video),
        steering_kind=drive.log.steering_kind if drive.log else None,
        speed_range_mps=_value_range(all_frames, SPEED),
        steering_range=_value_range(all_frames, STEERING),
        valid_share=float(all_frames.action_valid.any(axis=1).mean()),
        measured_s=float(measured.timestamps[-1]),
        synchrony=synchrony,
        picture=picture,
        problems=problems,
        notices=(
            *drive.notices,
            *(chosen.notices if rate else ()),
            *decoded.about_losses(lost),
            *missing,
            *(assumptions(drive) if synchrony.correlation is not None else ()),
        ),
    )


def inspect_drives(
    paths: Sequence[Path],
    out: Path,
    reading: Reading = AS_NAMED,
    *,
    fps: float | None = None,
    every: int | None = None,
) -> Report:
    """Find the drives in files and folders, measure them and report what is wrong with them.

    Compares the image motion with the actions in the first 5 minutes of each drive. Writes a PNG
    for each drive and `inspection.json` into the folder `out`, and replaces an earlier inspection
    there. The report lists drives that cannot be read in `skipped`. With a frame rate `fps` or a
    stride `every`, it also says how much of each drive is usable at this rate, and why not all.

    Raises DriveSimError if there are no drives, if `out` contains other files, if `out` cannot be
    written, if the rate is not allowed, or if a folder with a wheelbase has no drives. If no drive
    can be read, prints the reason for each drive and raises DriveSimError.
    """
    check_rate(fps, every)
    rate = {name: value for name, value in (("fps", fps), ("every", every)) if value is not None}
    check_replaceable(
        out,
        _REPORT,
        "an inspection",
        lambda earlier: [_REPORT, *(str(drive["picture"]) for drive in earlier["drives"])],
    )
    drive_set = find_drives(paths, reading)
    for name, metres in reading.wheelbases.items():
        if name and all(drive.wheelbase_m != metres for drive in drive_set.drives):
            raise DriveSimError(f"`wheelbase` {name}={metres:g}: no drive in {name} was read")
    skipped = list(drive_set.skipped)
    reports = []
    frames = sum(int((drive.timestamps < _MEASURED_S).sum()) for drive in drive_set.drives)
    with atomic_folder(out) as folder, progress(frames, "inspect", "frames") as bar:
        for drive in drive_set.drives:
            count = max(1, int(np.searchsorted(drive.timestamps, _MEASURED_S)))
            measured = sample(replace(drive, timestamps=drive.timestamps[:count]))
            try:
                lost, motion, change = _measure(measured, bar)
            except DriveSimError as error:
                skipped.append(Skipped(id=drive.id, reason=str(error)))
            else:
                reports.append(_report(drive, measured, lost, motion, change, folder, rate))
        if not reports:
            for line in drive_set.notices:
                bar.say(line)
            for skip in skipped:
                bar.say(f"skipped {skip.id}: {skip.reason}")
            raise DriveSimError("every drive was skipped: nothing is left to inspect")
        own = grouped((report.id, report.notices) for report in reports)
        notices = [*drive_set.passed_over, *own]
        report = Report(drives=reports, skipped=skipped, notices=notices)
        (folder / _REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report
