"""The parts of a report: sections with metrics, text, tables, pictures and videos."""

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from PIL import Image

from driving_sim.data.arrays import Pixels
from driving_sim.data.video.writer import write_video
from driving_sim.evaluate.report.cell import Cell


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a caption, column headings and rows."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """A picture or a playable video."""

    caption: str
    type: Literal["image/png", "image/jpeg", "video/mp4"]
    data: bytes


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a report, with the metrics that it explains."""

    name: str
    """Key of the section's metrics in `metrics.json`."""
    title: str
    text: str
    """Explanation of what was measured and how to read it. Blank lines separate paragraphs."""
    metrics: Mapping[str, Any]
    """Metrics by name, for JSON: numbers, curves (lists of numbers), and mappings of these."""
    parts: Sequence[Table | Media] = ()


def plot(figure: Figure, caption: str) -> Media:
    """Return a matplotlib figure as a PNG picture, in the common style of all plots."""
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Media(caption=caption, type="image/png", data=buffer.getvalue())


def photo(frame: Pixels, caption: str) -> Media:
    """Return a frame, uint8 RGB [H, W, 3], as a JPEG picture."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=90)
    return Media(caption=caption, type="image/jpeg", data=buffer.getvalue())


def film(frames: Sequence[Pixels], fps: float, caption: str) -> Media:
    """Return frames, each uint8 RGB [H, W, 3], as an MP4 video."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_video(path, frames, fps)
        return Media(caption=caption, type="video/mp4", data=path.read_bytes())
