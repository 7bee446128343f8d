"""Log a training run as JSON lines, in TensorBoard and as text, and show its progress."""

import io
import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.event_file_writer import (  # type: ignore[import-untyped]
    EventFileWriter,
)
from torch.utils.tensorboard import SummaryWriter

from driving_sim.engine.files import atomic_file
from driving_sim.engine.progress import Progress, progress
from driving_sim.engine.training.trainable import Pixels, Validation

METRICS = "metrics.jsonl"
LINES = "log.txt"
TENSORBOARD = "tensorboard"
_SHOWN = ("bits_per_token", "loss")
"""Names of the metrics to show beside the progress. If both are logged, only the first is shown."""


class RunLog:
    """Writes `metrics.jsonl`, `log.txt` and `tensorboard/` of a run. Use `run_log` to create it."""

    def __init__(
        self, rows: TextIO, lines: TextIO, writer: SummaryWriter, progress: Progress
    ) -> None:
        self._rows, self._lines, self._writer, self._progress = rows, lines, writer, progress
        self._text = ""

    def say(self, line: str) -> None:
        """Print one line, and append it to `log.txt`."""
        self._progress.say(line)
        self._lines.write(line + "\n")
        self._lines.flush()

    def advance(self, fraction: float) -> None:
        """Count a step. `fraction` is the completed share of the run."""
        self._progress.advance(fraction=fraction, text=self._text)

    def add_scalars(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Log numbers of a `phase` (train or validation). NaN and infinities become null."""
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._rows.write(json.dumps({"step": step, "phase": phase, **row}) + "\n")
        self._rows.flush()
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{phase}/{name}", value, step)
        if names := [name for name in _SHOWN if name in values]:
            self._text = f"{names[0]} {values[names[0]]:.4g}"

    def add_validation(self, step: int, validation: Validation, *, best: bool) -> None:
        """Log the numbers, images and videos of a validation, and print the numbers."""
        values = {"score": validation.score, **validation.metrics}
        self.add_scalars(step, "validation", values)
        for name, image in validation.images.items():
            self._writer.add_image(f"validation/{name}", image, step, dataformats="HWC")
        for name, video in validation.videos.items():
            self.add_gif(step, f"validation/{name}", video)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"step {step}: {numbers}{' (best)' if best else ''}")

    def add_gif(self, step: int, name: str, frames: Pixels) -> None:
        """Log a uint8 [T, H, W, 3] video as an animated image with 10 frames per second.

        TensorBoard's own `add_video` writes nothing if moviepy is not installed.
        """
        first, *rest = map(Image.fromarray, np.ascontiguousarray(frames))
        gif = io.BytesIO()
        first.save(gif, "GIF", save_all=True, append_images=rest, duration=100, loop=0)
        image = Summary.Image(
            height=first.height,
            width=first.width,
            colorspace=3,
            encoded_image_string=gif.getvalue(),
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        files = self._writer._get_file_writer()  # type: ignore[no-untyped-call]
        files.add_summary(summary, step)


@contextmanager
def run_log(
    run: Path,
    *,
    start_step: int = 0,
    validated_step: int | None = None,
    total: int | None = None,
) -> Iterator[RunLog]:
    """Yield the log of the training run in the folder `run`.

    `start_step` is the step from which the run continues. Training metrics of later steps are
    deleted from the log, because they will be logged again. Validations are deleted if their step
    is later than `validated_step`, which defaults to `start_step`. `total` is the number of steps,
    or None if it is unknown.
    """
    _drop_rows_after(
        run / METRICS, start_step, start_step if validated_step is None else validated_step
    )
    folder, purge = run / TENSORBOARD, start_step + 1 if start_step else None
    with (
        _quiet_tensorboard(),
        (run / METRICS).open("a", encoding="utf-8") as rows,
        (run / LINES).open("a", encoding="utf-8") as lines,
        closing(SummaryWriter(folder, purge_step=purge, flush_secs=30)) as writer,
        progress(total, run.name, "steps", start=start_step) as counter,
    ):
        log = RunLog(rows, lines, writer, counter)
        log.say(f"results in {run} (watch: tensorboard --logdir {folder})")
        yield log


@contextmanager
def _quiet_tensorboard() -> Iterator[None]:
    """Keep TensorBoard's writer thread from printing its errors.

    The errors are not lost, because the next write to TensorBoard raises them again.
    """
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__module__ != EventFileWriter.__module__:
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _drop_rows_after(path: Path, step: int, validated_step: int) -> None:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as rows:
        kept_rows = [row for row in rows if _is_before(row, step, validated_step)]
    # Close `path` before this, because Windows cannot replace an open file.
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept_rows), "utf-8")


def _is_before(row: str, step: int, validated_step: int) -> bool:
    try:
        values = json.loads(row)
        last = validated_step if values["phase"] == "validation" else step
        return float(values["step"]) <= last
    except (ValueError, KeyError):
        return False  # the row was cut off when the run was killed
