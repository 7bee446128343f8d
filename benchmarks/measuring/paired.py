"""Code that all speed benchmarks share: timing in turns, ratios, claims, and the bars on them.

drivesim and its peer run in one process, in turns, so that other load on the machine slows both.
Each round gives one ratio; the reported ratio is the median over the rounds.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from driving_sim.engine.device import resolve_device
from driving_sim.engine.threads import keep_freed_memory, usable_cores

Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of a measurement."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device that drivesim and its peers run on."""
    rounds: int = 5
    """Number of times that each piece of work is timed."""
    toy: bool = False
    """Whether to use tiny sizes that only test the commands."""


def rounded(value: float) -> str:
    """Return a number with three significant digits and commas between thousands."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


@dataclass(frozen=True, slots=True)
class Figure:
    """Median and range of a measured figure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Summarise the figures of the rounds, one for each round."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One row of the table: a ratio to a peer's speed, or a figure of drivesim alone."""

    what: str
    """Short name of the work; docs/speed.md explains it."""
    figure: Figure
    """How many times as fast as the peer; without a peer, drivesim's own figure."""
    unit: str = "×"
    """Text after the figure and its bar; "%" shows shares as percentages."""
    bar: float | None = None
    """Value that the median of the figure should reach."""
    at_most: bool = False
    """Whether the figure must stay at or below the bar."""
    against: str = ""
    """Name of the peer, or "" without one."""
    own: str = ""
    """drivesim's rate, as in "94.0 frames/s", if there is a peer."""
    peer: str = ""
    """The peer's rate in the same unit."""
    limits: str = ""
    """Share of the machine's limits that drivesim uses, as `Limits.share` writes it."""
    details: tuple[str, ...] = ()
    """Sizes, settings and further figures, which only the command prints."""
    command: str = ""
    """Command that measured the claim."""

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the bar; None without a bar."""
        if self.bar is None:
            return None
        if self.at_most:
            return self.figure.median <= self.bar
        return self.figure.median >= self.bar

    def bar_text(self) -> str:
        """Return the bar as in "≥ 10×", or "" without a bar."""
        if self.bar is None:
            return ""
        return f"{'≤' if self.at_most else '≥'} {self._scaled(self.bar):g}{self._unit()}"

    def figure_text(self) -> str:
        """Return the figure as in "12.3× (11.9 to 12.6)"."""
        median, least, most = map(
            self._number, (self.figure.median, self.figure.least, self.figure.most)
        )
        return f"{median}{self._unit()}" + (f" ({least} to {most})" if least != most else "")

    def _number(self, value: float) -> str:
        return rounded(self._scaled(value))

    def _scaled(self, value: float) -> float:
        return 100 * value if self.unit == "%" else value

    def _unit(self) -> str:
        return self.unit if self.unit == "×" else f" {self.unit}"

    def cells(self) -> list[str]:
        """Return the cells of the claim's row: what, drivesim, peer, times as fast, limits."""
        if self.against:
            peer, ratio = f"{self.peer} ({self.against})", self.figure_text()
            own = self.own
        else:
            own, peer, ratio = self.figure_text(), "–", "–"
        return [self.what, own, peer, ratio, self.limits or "–"]

    def __str__(self) -> str:
        against = f", {self.own} against {self.peer} of {self.against}" if self.against else ""
        bar = ""
        if self.bar is not None:
            bar = f", bar {self.bar_text()}: {'reached' if self.reached else 'missed'}"
        limits = [f"  {self.limits}"] if self.limits else []
        lines = [f"{self.what}{against}: {self.figure_text()}{bar}", *limits]
        return "\n".join([*lines, *(f"  {detail}" for detail in self.details)])


Benchmark = Callable[[Settings], list[Claim]]


def alternate(work: Mapping[str, Work], settings: Settings) -> dict[str, list[float]]:
    """Return the seconds of each piece of work in each round, after a warm-up round.

    Every other round runs in reverse order, so that no piece of work always follows the same one.
    """
    for act in work.values():
        seconds(act, settings.device)
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(settings.rounds):
        names = list(work) if number % 2 == 0 else list(work)[::-1]
        for name in names:
            times[name].append(seconds(work[name], settings.device))
    return times


def seconds(act: Work, device: torch.device) -> float:
    """Return the seconds that `act` takes once, until the device has finished."""
    _wait(device)
    begun = time.perf_counter()
    act()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_faster(peer: Sequence[float], own: Sequence[float], *, work: float = 1.0) -> Figure:
    """Return how many times as fast drivesim is as its peer, from the seconds of both.

    `work` is the amount of work that the peer does in its seconds, in units of drivesim's.
    """
    return Figure.of([theirs / work / ours for theirs, ours in zip(peer, own, strict=True)])


def run_command(
    doc: str | None, module: str, benchmarks: Mapping[str, Benchmark], arguments: list[str]
) -> None:
    """Parse `arguments`, run the benchmarks that they name (default: all), print the claims."""
    parser = argparse.ArgumentParser(description=doc, prog=f"python -m benchmarks.{module}")
    parser.add_argument(
        "names", nargs="*", help=f"benchmarks to run: {', '.join(benchmarks)}; default: all"
    )
    add_options(parser)
    parser.add_argument("--json", type=Path, help="append the claims to this file, one a line")
    options = parser.parse_args(arguments)
    settings = settings_of(options)
    for name in options.names or benchmarks:
        if name not in benchmarks:
            parser.error(f"{name}: expected one of {', '.join(benchmarks)}")
        for claim in benchmarks[name](settings):
            print(claim, flush=True)
            if options.json:
                device = "" if options.device == "cpu" else f" --device {options.device}"
                command = f"python -m benchmarks.{module} {name}{device}"
                with options.json.open("a") as file:
                    file.write(json.dumps(asdict(claim) | {"command": command}) + "\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `settings_of` reads to a command's parser."""
    parser.add_argument("--device", default="cpu", help="auto, cuda, mps or cpu; default: cpu")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; default: 5")
    parser.add_argument("--threads", type=int, help="torch's threads; default: one for each core")
    parser.add_argument("--toy", action="store_true", help="tiny sizes that only test the commands")


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings that the options ask for, and prepare the process for measuring.

    Sets torch's number of threads, and keeps freed memory as `drivesim` does, for peers too.
    """
    keep_freed_memory()
    torch.set_num_threads(options.threads or usable_cores())
    return Settings(device=resolve_device(options.device), rounds=options.rounds, toy=options.toy)


def read_claims(path: Path) -> list[Claim]:
    """Return the claims in a file that `--json` wrote; none if there is no file."""
    claims = []
    for line in path.read_text().splitlines() if path.exists() else ():
        saved = json.loads(line)
        figure, details = Figure(**saved.pop("figure")), tuple(saved.pop("details"))
        claims.append(Claim(figure=figure, details=details, **saved))
    return claims
