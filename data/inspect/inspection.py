"""Inspect drives: report what they contain and what is wrong with them (`drivesim inspect`)."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_log import SPEED, STEERING, SteeringKind
from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.arrays import Floats32, Mask, Pixels
from driving_sim.data.drive import Drive, SampledDrive, Skipped, grouped, sample
from driving_sim.data.inspect.motion import picture_change, yaw_motion
from driving_sim.data.inspect.picture import draw_drive
from driving_sim.data.inspect.steering_check import Synchrony, measure_synchrony
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
_LEGEND = """\
gaps             places where the video misses frames, and the longest time between two frames
speed, steering  1st and 99th percentile; steering is left positive, in rad, in 1/m (curvature)
                 or from -1 to 1 (normalised)
known            share of the frames with a known speed or steering
lag              frames by which the actions come later (+) or earlier (-) than the motion in the
                 picture; 0 to -0.25 s is normal, because a car turns shortly after it steers;
                 a positive lag needs a negative `time_offset`, a negative lag a positive one
sign             "left +": positive steering turns left, as it must; FLIPPED: it turns right
r                correlation of steering and motion at this lag; if it is weaker than 0.5, lag and
                 sign are unknown (-)
"""
"""Explanation of the columns, printed below the table."""
_VIDEO = "{0.codec} in {0.container}, {0.width}x{0.height}, read by {0.reader}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DriveReport:
    """The results of inspecting one drive."""

    id: str
    source: str
    frames: int
    duration_s: float
    fps: float
    """Mean frame rate between the gaps."""
    gaps: int
    """Number of gaps. A gap is a pair of neighbouring frames more than 1.5 median periods apart."""
    longest_gap_s: float
    video: str | None
    """Codec, container, size and reader; None if the frames do not come from a video."""
    steering_kind: SteeringKind | None
    speed_range_mps: tuple[float, float] | None
    """1st and 99th percentile of the speed; None if unknown."""
    steering_range: tuple[float, float] | None
    """1st and 99th percentile of the steering, in the unit of its kind, left positive; None if
    unknown."""
    valid_share: float
    """Share of the frames whose speed or steering is known."""
    measured_s: float
    """Number of seconds, from the start of the drive, for which the image motion was compared with
    the actions."""
    synchrony: Synchrony
    picture: str | None
    """Path of the PNG, relative to the output folder."""
    problems: tuple[str, ...]
    """Problems of the drive and what to do about them, one line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The results of inspecting all drives, and the drives that were skipped."""

    drives: list[DriveReport]
    skipped: list[Skipped]
    notices: list[str]

    def table(self) -> str:
        """Return the report as text: a table of drives, its legend, and lists of the problems, of
        the skipped drives and of the assumptions."""
        named = [_row(drive) for drive in self.drives]
        rows = [tuple(named[0]), *(tuple(row.values()) for row in named)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += ["", *_LEGEND.splitlines()]
        sections = {
            "problems": [f"{drive.id}: {line}" for drive in self.drives for line in drive.problems],
            "skipped": [f"{skipped.id}: {skipped.reason}" for skipped in self.skipped],
            "assumed": self.notices,
        }
        for title, entries in sections.items():
            if entries:
                lines += ["", f"{title} ({len(entries)})", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


def _row(drive: DriveReport) -> dict[str, str]:
    """Return the table row of a drive, as a dictionary from column title to cell."""
    synchrony = drive.synchrony
    lag, correlation = synchrony.lag_frames, synchrony.correlation
    return {
        "drive": drive.id,
        "source": drive.source,
        "frames": str(drive.frames),
        "seconds": f"{drive.duration_s:.1f}",
        "fps": f"{drive.fps:.2f}",
        "gaps": f"{drive.gaps} (max {drive.longest_gap_s:.2f} s)" if drive.gaps else "0",
        "speed m/s": _range(drive.speed_range_mps, ".1f"),
        "steering": _range(drive.steering_range, ".3f"),
        "kind": drive.steering_kind or "-",
        "known": f"{drive.valid_share:.0%}",
        "lag": "-" if lag is None else f"{lag:+d}",
        "sign": {1: "left +", -1: "FLIPPED", None: "-"}[synchrony.sign],
        "r": "-" if correlation is None else f"{correlation:.2f}",
        "problems": str(len(drive.problems) or "none"),
    }


def _range(values: tuple[float, float] | None, form: str) -> str:
    return "-" if values is None else f"{values[0]:{form}} to {values[1]:{form}}"


def _measure(sampled: SampledDrive, bar: Progress) -> tuple[Mask, Floats32, Floats32]:
    """Return which of a drive's frames [N] are lost to damage, and `yaw_motion` and
    `picture_change` between the T others, [T - 1] each."""
    measured = [np.zeros((2, 0), np.float32)]
    lost = np.zeros(len(sampled.indices), np.bool_)
    frames = _intact(sampled, lost)
    block = list(islice(frames, _FRAMES_AT_ONCE))
    while len(block) > 1:
        pictures = np.stack(block)
        measured.append(np.stack([yaw_motion(pictures), picture_change(pictures)]))
        bar.advance(len(block) - 1)
        # Begin each block with the last frame of the previous block, because motion is measured
        # between pairs of frames.
        block = [block[-1], *islice(frames, _FRAMES_AT_ONCE - 1)]
    bar.advance(1)
    motion, change = np.concatenate(measured, axis=1)
    return lost, motion, change


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


def _report(
    drive: Drive, measured: SampledDrive, motion: Floats32, change: Floats32, out: Path
) -> DriveReport:
    all_frames = sample(drive)
    synchrony = measure_synchrony(motion, measured)
    problems = (*synchrony.problems, *_speed_problems(measured, change))
    gap_lengths = np.diff(all_frames.timestamps)[~within_segments(all_frames.segments)]
    picture = f"{drive.id}.png"
    draw_drive(
        out / picture,
        measured,
        np.where(within_segments(measured.segments), motion, np.nan),
        f"{drive.id}: {_caption(problems)}",
    )
    return DriveReport(
        id=drive.id,
        source=drive.source,
        frames=len(drive.timestamps),
        duration_s=float(drive.timestamps[-1] - drive.timestamps[0]),
        fps=all_frames.fps,
        gaps=len(gap_lengths),
        longest_gap_s=float(gap_lengths.max(initial=0.0)),
        video=None if drive.video is None else _VIDEO.format(drive.video),
        steering_kind=drive.log.steering_kind if drive.log else None,
        speed_range_mps=_value_range(all_frames, SPEED),
        steering_range=_value_range(all_frames, STEERING),
        valid_share=float(all_frames.action_valid.any(axis=1).mean()),
        measured_s=float(measured.timestamps[-1]),
        synchrony=synchrony,
        picture=picture,
        problems=problems,
    )


def inspect_drives(
    paths: Sequence[Path],
    out: Path,
    reading: Reading = AS_NAMED,
) -> Report:
    """Find the drives in files and folders, measure them and report what is wrong with them.

    Compares the image motion with the actions in the first 5 minutes of each drive. Writes a PNG
    for each drive and `inspection.json` into the folder `out`, and replaces an earlier inspection
    there. The report lists drives that cannot be read in `skipped`.

    Raises DriveSimError if there are no drives, if `out` contains other files, or if `out` cannot
    be written. If no drive can be read, prints the reason for each drive and raises DriveSimError.
    """
    check_replaceable(
        out,
        _REPORT,
        "an inspection",
        lambda earlier: [_REPORT, *(str(drive["picture"]) for drive in earlier["drives"])],
    )
    drive_set = find_drives(paths, reading)
    skipped = list(drive_set.skipped)
    reports = []
    losses: list[tuple[str, tuple[str, ...]]] = []
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
                losses.append((drive.id, measured.about_losses(lost)))
                intact = measured.without(lost)
                reports.append(_report(drive, intact, motion, change, folder))
        if not reports:
            for line in drive_set.notices:
                bar.say(line)
            for skip in skipped:
                bar.say(f"skipped {skip.id}: {skip.reason}")
            raise DriveSimError("every drive was skipped: nothing is left to inspect")
        notices = drive_set.notices + grouped(losses)
        report = Report(drives=reports, skipped=skipped, notices=notices)
        (folder / _REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report
