"""What an inspection found: a report on each drive, and all of them as a table."""

from dataclasses import dataclass

from driving_sim.data.actions.action_log import SteeringKind
from driving_sim.data.drive import Skipped, grouped
from driving_sim.data.inspect.steering_check import Synchrony

_LEGEND = """\
gaps             places where the video misses frames, and the longest time between two frames
{usable}
speed, steering  1st and 99th percentile; steering is left positive, in rad, in 1/m (curvature)
                 or from -1 to 1 (normalised)
known            share of the frames with a known speed or steering
lag              frames by which the actions come later (+) or earlier (-) than the motion in the
                 picture; 0 to -0.25 s is normal, because a car turns shortly after it steers;
                 a positive lag needs a negative `time_offset`, a negative lag a positive one;
                 two lags, such as +1 to +6, are those at the start and at the end of a drift
sign             "left +": positive steering turns left, as it must; FLIPPED: it turns right
r                correlation of steering and motion at this lag; where it is weak, or rests on too
                 few turns, lag and sign are unknown (-), and a line below the table says why
"""
"""Explanation of the columns, printed below the table."""
_USABLE = (
    "usable           share of the drive's time in runs of at least 1 s without a gap at this rate"
)


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
    """Number of gaps. A gap is a pair of neighbouring frames more than 1.5 periods apart: periods
    of the frame rate that was asked for, or median periods of the drive."""
    longest_gap_s: float
    usable_share: float | None
    """Share of the drive's time in runs of at least 1 s without a gap, at the frame rate that was
    asked for; None if none was."""
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
    """Path of the PNG, relative to the output folder; None if it could not be written."""
    problems: tuple[str, ...]
    """Problems of the drive and what to do about them, one line each."""
    notices: tuple[str, ...]
    """What was assumed, left out or resampled, one line each. `synchrony` says what cannot be told
    about the steering."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The results of inspecting all drives, and the drives that were skipped."""

    drives: list[DriveReport]
    skipped: list[Skipped]
    notices: list[str]
    """One line for everything that was assumed, left out or resampled, with the drives' ids."""

    def table(self) -> str:
        """Return the report as text: a table of drives, its legend, and lists of the problems, of
        what cannot be told, of the skipped drives and of the assumptions."""
        named = [_row(drive) for drive in self.drives]
        rows = [tuple(named[0]), *(tuple(row.values()) for row in named)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        legend = _LEGEND.format(usable=_USABLE if "usable" in named[0] else "")
        lines += ["", *(line for line in legend.splitlines() if line)]
        sections = {
            "problems": [f"{drive.id}: {line}" for drive in self.drives for line in drive.problems],
            "cannot tell": grouped((drive.id, drive.synchrony.notices) for drive in self.drives),
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
    correlation = synchrony.correlation
    usable = {} if drive.usable_share is None else {"usable": f"{drive.usable_share:.0%}"}
    return {
        "drive": drive.id,
        "source": drive.source,
        "frames": str(drive.frames),
        "seconds": f"{drive.duration_s:.1f}",
        "fps": f"{drive.fps:.2f}",
        "gaps": f"{drive.gaps} (max {drive.longest_gap_s:.2f} s)" if drive.gaps else "0",
        **usable,
        "speed m/s": _range(drive.speed_range_mps, ".1f"),
        "steering": _range(drive.steering_range, ".3f"),
        "kind": drive.steering_kind or "-",
        "known": f"{drive.valid_share:.0%}",
        "lag": _lag(synchrony),
        "sign": {1: "left +", -1: "FLIPPED", None: "-"}[synchrony.sign],
        "r": "-" if correlation is None else f"{correlation:.2f}",
        "problems": str(len(drive.problems) or "none"),
    }


def _lag(synchrony: Synchrony) -> str:
    if synchrony.drift is not None:
        start, end = synchrony.drift.lags
        return f"{start:+d} to {end:+d}"
    return "-" if synchrony.lag_frames is None else f"{synchrony.lag_frames:+d}"


def _range(values: tuple[float, float] | None, form: str) -> str:
    return "-" if values is None else f"{values[0]:{form}} to {values[1]:{form}}"
