"""What an evaluation finds: numbers for machines, tables and pictures for people."""

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
    """Rows of cells under headings."""

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
    """One subject of a report."""

    name: str
    """Key of its metrics in `metrics.json`."""
    title: str
    text: str
    """What was measured and how to read it; paragraphs are parted by blank lines."""
    metrics: Mapping[str, Any]
    """JSON: numbers, lists of numbers (curves), and mappings of them by name."""
    parts: Sequence[Table | Media] = ()


def plot(figure: Figure, caption: str) -> Media:
    """Return a matplotlib figure as a picture, in the style that all plots of a report share."""
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Media(caption=caption, type="image/png", data=buffer.getvalue())


def photo(frame: Pixels, caption: str) -> Media:
    """Return a frame, uint8 RGB [H, W, 3], as a picture."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=90)
    return Media(caption=caption, type="image/jpeg", data=buffer.getvalue())


def film(frames: Sequence[Pixels], fps: float, caption: str) -> Media:
    """Return frames, uint8 RGB [H, W, 3] each, as a playable video."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_video(path, frames, fps)
        return Media(caption=caption, type="video/mp4", data=path.read_bytes())
