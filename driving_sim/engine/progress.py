"""Show the progress of a long command on stderr: a bar on a terminal, otherwise plain lines."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from driving_sim.engine.torchrun import is_main_process

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

T = TypeVar("T")

LINE_SECONDS = 10.0
"""Seconds between two plain lines."""
BAR_SECONDS = 0.1
"""Seconds between two updates of the bar."""

wording: Callable[[str], str] = str
"""Function applied to all lines before printing. The command line sets it to a function that
replaces the names of settings with flags."""


def say(line: str, *, by_any_rank: bool = False) -> None:
    """Print a line on stderr. Only the main rank prints it, unless `by_any_rank`."""
    if by_any_rank or is_main_process():
        print(wording(line), file=sys.stderr, flush=True)


class Progress:
    """Counts units of work and shows the rate and the time left. Use `progress` to create it."""

    def __init__(
        self, total: float | None, label: str, unit: str, start: float, bar: "RichProgress | None"
    ) -> None:
        self._total, self._label, self._unit, self._bar = total, label, unit, bar
        self._task: Any = bar.add_task(label, total=1.0, status="") if bar else None
        self._pause = BAR_SECONDS if bar else LINE_SECONDS
        self._began = time.perf_counter()
        self._next_show = self._began + self._pause
        self._start = self._done = start
        self._start_fraction: float | None = None
        self._fraction = 0.0

    def advance(self, amount: float = 1, *, fraction: float | None = None, text: str = "") -> None:
        """Count `amount` more units as done.

        `fraction` (0 to 1) is the completed share of the work; the default is done / total. `text`
        is shown at the end of the line.
        """
        if self._start_fraction is None:
            self._start_fraction = self._share(self._start) if fraction is None else fraction
        self._done += amount
        self._fraction = min(1.0, self._share(self._done) if fraction is None else fraction)
        now = time.perf_counter()
        if now >= self._next_show:
            self._next_show = now + self._pause
            status = self._status(text)
            if self._bar:
                self._bar.update(self._task, completed=self._fraction, status=status)
            else:
                self.say(f"{self._label}: {status}")

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items. Count an item as one unit done when the caller requests the next."""
        for item in items:
            yield item
            self.advance()

    def say(self, line: str, *, by_any_rank: bool = False) -> None:
        """Print a separate line, above the bar if there is one.

        Without a bar, only the main rank prints it, unless `by_any_rank`.
        """
        if self._bar:
            self._bar.console.print(wording(line), markup=False, highlight=False, soft_wrap=True)
        else:
            say(line, by_any_rank=by_any_rank)

    def finish(self) -> None:
        """Print how many units were done, and how long they took."""
        seconds = time.perf_counter() - self._began
        done = self._done - self._start
        self.say(f"{self._label}: {done:,.0f} {self._unit} in {_clock(seconds)}")

    def _share(self, done: float) -> float:
        return done / self._total if self._total else 0.0

    def _status(self, text: str) -> str:
        elapsed = time.perf_counter() - self._began
        rate = (self._done - self._start) / elapsed
        total = f"/{self._total:,.0f}" if self._total else ""
        parts = [f"{self._done:,.0f}{total} {self._unit}", f"{rate:.3g} {self._unit}/s"]
        covered = self._fraction - (self._start_fraction or 0.0)
        if covered > 0:
            parts.append(f"{_clock(elapsed * (1.0 - self._fraction) / covered)} left")
        return ", ".join([*parts, text] if text else parts)


@contextmanager
def progress(total: float | None, label: str, unit: str, *, start: float = 0) -> Iterator[Progress]:
    """Show progress through `total` units of work, e.g. `progress(900, "tokenize", "frames")`.

    `total` is None if unknown. `start` is the number of units that were done before. They are not
    included in the rate.
    """
    # Import rich here: the command line imports this module, and `--help` must not wait for rich.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    bar: RichProgress | None = None
    if console.is_terminal and is_main_process():
        # Markup is off, because paths may contain square brackets.
        label_column, status = (
            TextColumn(column, markup=False)
            for column in ("{task.description}", "{task.fields[status]}")
        )
        bar = RichProgress(label_column, BarColumn(), status, console=console, transient=True)
    with bar or nullcontext():
        counter = Progress(total, label, unit, start, bar)
        yield counter
        counter.finish()


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
