"""Plot the speed, the steering and the image motion of an inspected drive over time."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from driving_sim.data.actions.action_log import SPEED, STEERING, UNITS
from driving_sim.data.arrays import Floats32
from driving_sim.data.drive import SampledDrive
from driving_sim.engine.files import atomic_file

_SIZE_INCHES = (12, 7)
_CAPTION_COLUMNS = 130
_INK = "#30343b"


def draw_drive(path: Path, sampled: SampledDrive, motion: Floats32, caption: str) -> None:
    """Write a PNG that plots a drive's actions and the image motion [T - 1] between its frames.

    Left is up for both steering and motion, so the two curves look alike if they agree.
    """
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    speed_axes, steering_axes, motion_axes = figure.subplots(3, 1, sharex=True)
    times = sampled.timestamps
    known = np.where(sampled.action_valid, sampled.actions, np.nan)
    log = sampled.drive.log
    unit = f"{log.steering_kind}\n{UNITS[log.steering_kind]}" if log and log.steering_kind else "-"
    motion_label = "image motion (car\nturns left: +)\npicture widths"
    rows = (
        (speed_axes, times, known[:, SPEED], "speed\nm/s", "#1b7f5c"),
        (steering_axes, times, known[:, STEERING], f"steering (left +)\n{unit}", "#b4541a"),
        (motion_axes, times[:-1], motion, motion_label, "#2a5db0"),
    )
    for axes, at, values, label, colour in rows:
        axes.plot(at, values, color=colour, linewidth=1.2)
        axes.set_ylabel(label, color=_INK)
        axes.axhline(0, color=_INK, linewidth=0.5, alpha=0.5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for start, _ in sampled.segments[1:]:
        for axes, *_ in rows:
            axes.axvspan(times[start - 1], times[start], color=_INK, alpha=0.15, linewidth=0)
    motion_axes.set_xlabel("time in s")
    lines = textwrap.fill(caption, _CAPTION_COLUMNS)
    # With `parse_math=True`, dollar signs in a file name would mark a formula.
    figure.suptitle(lines, color=_INK, x=0.01, horizontalalignment="left", parse_math=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=100)
