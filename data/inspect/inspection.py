"""What is in a folder of drives, and what is wrong with it: `drivesim inspect`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_file import SPEED, STEERING, SteeringKind
from driving_sim.data.arrays import Floats32
from driving_sim.data.drive import Drive, SampledDrive, Skipped, sample
from driving_sim.data.inspect.motion import picture_change, yaw_motion
from driving_sim.data.inspect.picture import draw_drive
from driving_sim.data.inspect.steering_check import Synchrony, measure_synchrony
from driving_sim.data.sources import find_drives
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.segments import within_segments
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_folder
from driving_sim.engine.progress import Progress, progress
from driving_sim.engine.run_folder import check_replaceable

# Motion is measured at this size; decoding to more would only cost time.
_SIZE = FrameSize(height=64, width=128)
_MEASURED_S = 300.0
_FRAMES_AT_ONCE = 256
_FASTEST_MPS = 60.0
_STANDING_MPS, _DRIVING_MPS = 0.3, 3.0
_FEW_FRAMES = 10
_REPORT = "inspection.json"
_VIDEO = "{0.codec} in {0.container}, {0.width}x{0.height}, read by {0.reader}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DriveReport:
    """What is known about one drive."""

    id: str
    source: str
    frames: int
    duration_s: float
    fps: float
    """Mean rate between the gaps."""
    gaps: int
    """Places where frames are missing: more than 1.5 periods between neighbours."""
    longest_gap_s: float
    video: str | None
    """Codec, container, size and reader, where the frames come from a video."""
    steering_kind: SteeringKind | None
    speed_range_mps: tuple[float, float] | None
    steering_range: tuple[float, float] | None
    """In the kind's unit, left positive."""
    valid_share: float
    """Of the frames, those whose actions are known."""
    measured_s: float
    """Time from the start of the drive over which the picture was compared with the actions."""
    synchrony: Synchrony
    picture: str | None
    """File name of the PNG."""
    problems: tuple[str, ...]
    """What is wrong, one line each, with the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What is known about all drives, and what was left out."""

    drives: list[DriveReport]
    skipped: list[Skipped]
    notices: list[str]

    def table(self) -> str:
        """The report as text: a row for each drive, then the problems, what was skipped and why."""
        named = [_row(drive) for drive in self.drives]
        rows = [tuple(named[0]), *(tuple(row.values()) for row in named)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        found = {
            "problems": [f"{drive.id}: {line}" for drive in self.drives for line in drive.problems],
            "skipped": [f"{skipped.id}: {skipped.reason}" for skipped in self.skipped],
            "assumed": self.notices,
        }
        for title, entries in found.items():
            if entries:
                lines += ["", f"{title} ({len(entries)})", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


def _row(drive: DriveReport) -> dict[str, str]:
    """A row of the table, by the titles of its columns."""
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


def _measure(sampled: SampledDrive, shown: Progress) -> tuple[Floats32, Floats32]:
    """Image motion and picture change [T - 1] of the frames."""
    measured = [np.zeros((2, 0), np.float32)]
    frames = sampled.drive.stream(_SIZE, sampled.indices)
    block = list(islice(frames, _FRAMES_AT_ONCE))
    while len(block) > 1:
        pictures = np.stack(block)
        measured.append(np.stack([yaw_motion(pictures), picture_change(pictures)]))
        shown.advance(len(block) - 1)
        # Blocks share one frame, so that no pair of neighbours is lost.
        block = [block[-1], *islice(frames, _FRAMES_AT_ONCE - 1)]
    shown.advance(1)
    motion, change = np.concatenate(measured, axis=1)
    return motion, change


def _speed_problems(sampled: SampledDrive, change: Floats32) -> list[str]:
    """Speeds that no car drives, and a picture that stands while the car drives."""
    speed, known = sampled.actions[:, SPEED], sampled.action_valid[:, SPEED]
    problems = []
    if known.any() and speed[known].max() > _FASTEST_MPS:
        problems.append(
            f"the speed reaches {speed[known].max():.0f} m/s ({speed[known].max() * 3.6:.0f} km/h):"
            " is the column in km/h (speed_kmh) or mph (speed_mph)?"
        )
    usable = known[:-1] & within_segments(sampled.segments)
    standing = change[usable & (np.abs(speed[:-1]) < _STANDING_MPS)]
    driving = change[usable & (np.abs(speed[:-1]) > _DRIVING_MPS)]
    if min(len(standing), len(driving)) >= _FEW_FRAMES and np.median(standing) > np.median(driving):
        problems.append(
            "the picture changes more where the speed is 0 than where the car drives: "
            "are these the actions of this video?"
        )
    return problems


def _value_range(sampled: SampledDrive, channel: int) -> tuple[float, float] | None:
    values = sampled.actions[sampled.action_valid[:, channel], channel]
    return (float(values.min()), float(values.max())) if len(values) else None


def _report(
    drive: Drive, measured: SampledDrive, motion: Floats32, change: Floats32, out: Path
) -> DriveReport:
    whole = sample(drive)
    synchrony = measure_synchrony(motion, measured)
    problems = (*synchrony.problems, *_speed_problems(measured, change))
    gap_lengths = np.diff(whole.timestamps)[~within_segments(whole.segments)]
    picture = f"{drive.id}.png"
    caption = f"{drive.id}: " + ("; ".join(problems) if problems else "no problems found")
    draw_drive(
        out / picture,
        measured,
        np.where(within_segments(measured.segments), motion, np.nan),
        caption,
    )
    return DriveReport(
        id=drive.id,
        source=drive.source,
        frames=len(drive.timestamps),
        duration_s=float(drive.timestamps[-1] - drive.timestamps[0]),
        fps=whole.fps,
        gaps=len(gap_lengths),
        longest_gap_s=float(gap_lengths.max(initial=0.0)),
        video=None if drive.video is None else _VIDEO.format(drive.video),
        steering_kind=drive.log.steering_kind if drive.log else None,
        speed_range_mps=_value_range(whole, SPEED),
        steering_range=_value_range(whole, STEERING),
        valid_share=float(whole.action_valid.any(axis=1).mean()),
        measured_s=float(measured.timestamps[-1]),
        synchrony=synchrony,
        picture=picture,
        problems=problems,
    )


def inspect_drives(
    paths: Sequence[Path],
    out: Path,
    *,
    steering_kind: str | None = None,
    time_offset: float = 0.0,
) -> Report:
    """Find the drives in files and folders, measure them and say what is wrong with them.

    Compares image motion with the actions over the first 5 minutes of each drive. Writes a PNG for
    each drive and `inspection.json` into the folder `out`, in place of an earlier inspection there.
    Drives that cannot be read are in `.skipped`. Raises DriveSimError where there is nothing to
    inspect, where no drive can be read, after a line with the reason for each, and where `out`
    holds anything else or cannot be written.
    """
    check_replaceable(
        out,
        _REPORT,
        "an inspection",
        lambda earlier: [_REPORT, *(str(drive["picture"]) for drive in earlier["drives"])],
    )
    found = find_drives(paths, steering_kind=steering_kind, time_offset=time_offset)
    skipped = list(found.skipped)
    reports = []
    frames = sum(int((drive.timestamps < _MEASURED_S).sum()) for drive in found.drives)
    with atomic_folder(out) as folder, progress(frames, "inspect", "frames") as shown:
        for drive in found.drives:
            count = max(1, int(np.searchsorted(drive.timestamps, _MEASURED_S)))
            measured = sample(replace(drive, timestamps=drive.timestamps[:count]))
            try:
                motion, change = _measure(measured, shown)
            except DriveSimError as error:
                skipped.append(Skipped(id=drive.id, reason=str(error)))
            else:
                reports.append(_report(drive, measured, motion, change, folder))
        if not reports:
            for lost in skipped:
                shown.say(f"skipped {lost.id}: {lost.reason}")
            raise DriveSimError("every drive was skipped: nothing is left to inspect")
        report = Report(drives=reports, skipped=skipped, notices=found.notices)
        (folder / _REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report
