"""Record a drive as a video and a CSV, like any other drive, and as the JSON file of a `Replay`."""

import secrets
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_file import write_action_file
from driving_sim.data.actions.action_log import SteeringKind
from driving_sim.data.arrays import Floats32, Pixels
from driving_sim.data.video.writer import video_writer
from driving_sim.engine.config import save_json, to_dict
from driving_sim.engine.errors import DriveSimError
from driving_sim.play.drive import Sight
from driving_sim.play.replay import Replay


class Recorder:
    """Writes the frames of a drive to a video, from a frame on.

    The last frames are held back for as long as the driver can go back behind them. The files
    appear when the recording is finished, or not at all. All methods raise DriveSimError if they
    cannot be written; the recording is then lost.
    """

    def __init__(self, folder: Path, first: Sight, *, fps: float, held_back: int) -> None:
        """Begin a video in `folder`. `held_back` is how many frames the driver can go back."""
        # Two drives that begin in the same second must not share a file.
        name = f"drive_{time.strftime('%Y%m%d-%H%M%S')}_{secrets.token_hex(2)}"
        self.path = folder / f"{name}.mp4"
        self.first_frame = first.frame
        self._fps, self._held_back = fps, held_back
        self._pending: deque[Pixels] = deque([first.pixels])
        self._last = first.frame
        self._video = ExitStack()
        height, width, _ = first.pixels.shape
        video = video_writer(self.path, fps=fps, height=height, width=width)
        with self._writing():
            self._write = self._video.enter_context(video)

    def add(self, sight: Sight) -> None:
        """Add the next frame of the drive."""
        self._pending.append(sight.pixels)
        self._last = sight.frame
        self._write_all_but(self._held_back + 1)

    def go_back(self, sight: Sight) -> None:
        """Forget the frames after the one that is seen now.

        If the video begins later, let it begin here.
        """
        for _ in range(min(self._last - sight.frame, len(self._pending))):
            self._pending.pop()
        if not self._pending:
            self._pending.append(sight.pixels)
            self.first_frame = sight.frame
        self._last = sight.frame

    def finish(self, replay: Replay, actions: Floats32, kind: SteeringKind | None) -> Path | None:
        """Write the files, and return the path of the video.

        `actions` [N, 2] are those of the whole drive. Without any, there is no CSV. A video of a
        single frame is not kept: return None.
        """
        if self._last == self.first_frame:
            self.discard()
            return None
        table, facts = self.path.with_suffix(".csv"), self.path.with_suffix(".json")
        try:
            self._write_all_but(0)
            with self._writing():
                self._video.close()
            led = actions[self.first_frame :]
            # No action leads from the last frame on; repeat the one before.
            actions = np.concatenate([led, led[-1:]])
            times, end_s = np.arange(len(actions)) / self._fps, len(actions) / self._fps
            with self._writing():
                if not np.isnan(actions).all():
                    write_action_file(table, times, actions, kind, hold_until=end_s)
                save_json(facts, to_dict(replay))
        except BaseException:
            self.discard()
            for path in (self.path, table, facts):
                path.unlink(missing_ok=True)
            raise
        return self.path

    def discard(self) -> None:
        """Leave no file behind."""
        stop = DriveSimError("the recording was discarded")
        self._video.__exit__(type(stop), stop, None)

    def _write_all_but(self, count: int) -> None:
        """Write the frames that are held back, except the last ones."""
        with self._writing():
            while len(self._pending) > count:
                self._write(self._pending.popleft())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the file system into a DriveSimError."""
        try:
            yield
        except OSError as error:
            raise DriveSimError(f"cannot write {self.path}: {error.strerror or error}") from error
