"""Timing and results of all speed benchmarks.

A benchmark compares drivesim with a peer, another library that does the same work. Both run in one
process, in turns, so other load on the machine slows both. Each round gives one ratio of their
times. The reported ratio is the median over the rounds.
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
    """Whether to use tiny sizes, which only test that the benchmarks run."""


def rounded(value: float) -> str:
    """Return a number as text, with three significant digits and commas between thousands."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


@dataclass(frozen=True, slots=True)
class Figure:
    """Median, minimum and maximum of a measured value over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Summarise a value that was measured once in each round."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One result of a benchmark: a comparison with a peer, or a value of drivesim alone."""

    what: str
    """Short name of the work that was measured, as in docs/speed.md."""
    figure: Figure
    """drivesim's speed divided by the peer's. Without a peer, a value of drivesim alone."""
    unit: str = "×"
    """Unit of the figure and the bar. With "%", both are shares and are shown as percentages."""
    bar: float | None = None
    """Goal that the median of the figure should reach, or None."""
    at_most: bool = False
    """Whether the bar is an upper bound. Otherwise it is a lower bound."""
    against: str = ""
    """Name of the peer, or "" if there is none."""
    own: str = ""
    """drivesim's rate, as in "94.0 frames/s", or "" if there is no peer."""
    peer: str = ""
    """The peer's rate in the same unit, or "" if there is no peer."""
    limits: str = ""
    """How close drivesim comes to the machine's limits, as text from `Limits.share`."""
    details: tuple[str, ...] = ()
    """Additional lines, which the command prints but docs/speed.md leaves out."""
    command: str = ""
    """Command that measured the claim."""

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the bar, or None if there is no bar."""
        if self.bar is None:
            return None
        if self.at_most:
            return self.figure.median <= self.bar
        return self.figure.median >= self.bar

    def bar_text(self) -> str:
        """Return the bar as in "≥ 10×", or "" if there is no bar."""
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
        """Return the cells of the claim's row in docs/speed.md, from left to right."""
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
    """Time each piece of work once per round, after a warm-up round. Return its seconds per round.

    Every second round runs in reverse order, so that no piece of work always follows the same one.
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
    """Call `act` once and wait until the device has finished. Return the seconds that this took."""
    _wait(device)
    begun = time.perf_counter()
    act()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_faster(peer: Sequence[float], own: Sequence[float], *, work: float = 1.0) -> Figure:
    """Return the speed-up of drivesim over its peer, from the seconds of both in each round.

    If drivesim and the peer do different amounts of work, `work` is the peer's amount divided by
    drivesim's.
    """
    return Figure.of([theirs / work / ours for theirs, ours in zip(peer, own, strict=True)])


def run_command(
    doc: str | None, module: str, benchmarks: Mapping[str, Benchmark], arguments: list[str]
) -> None:
    """Run the benchmarks that `arguments` name (default: all), and print their claims."""
    parser = argparse.ArgumentParser(description=doc, prog=f"python -m benchmarks.{module}")
    parser.add_argument(
        "names", nargs="*", help=f"benchmarks to run: {', '.join(benchmarks)}; default: all"
    )
    add_options(parser)
    parser.add_argument("--json", type=Path, help="append the claims to this file, one per line")
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
    """Add to a command's parser the options that `settings_of` reads."""
    parser.add_argument("--device", default="cpu", help="auto, cuda, mps or cpu; default: cpu")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; default: 5")
    parser.add_argument("--threads", type=int, help="torch's threads; default: one for each core")
    parser.add_argument(
        "--toy", action="store_true", help="use tiny sizes, only to test the command"
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Prepare the process for measuring, and return the settings that the options ask for.

    Sets torch's number of threads. Keeps freed memory for reuse, as drivesim's commands do, which
    applies to the peers too.
    """
    keep_freed_memory()
    torch.set_num_threads(options.threads or usable_cores())
    return Settings(device=resolve_device(options.device), rounds=options.rounds, toy=options.toy)


def read_claims(path: Path) -> list[Claim]:
    """Return the claims in a file that `--json` wrote, or no claims if there is no such file."""
    claims = []
    for line in path.read_text().splitlines() if path.exists() else ():
        saved = json.loads(line)
        figure, details = Figure(**saved.pop("figure")), tuple(saved.pop("details"))
        claims.append(Claim(figure=figure, details=details, **saved))
    return claims
