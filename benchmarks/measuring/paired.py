"""What every speed benchmark shares: work timed in turns, ratios, claims and their bars.

What is compared runs in one process, in turns, so that whatever else the machine does disturbs
both. A ratio is the median over the rounds of each round's own.
"""

import argparse
import json
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
    """How to measure."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where both run."""
    rounds: int = 5
    """How often each is timed."""
    toy: bool = False
    """Sizes that try out the commands and say nothing of the machine."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured figure: the median over the rounds, and the range."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Summarise the figure of each round."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One line of the table: what was measured, against what, and the bar for it."""

    what: str
    against: str
    figure: Figure
    bar: float | None = None
    unit: str = "×"
    """What stands after figure and bar; "%" shows shares as percentages."""
    at_most: bool = False
    """Whether the figure must stay below the bar, not reach it."""
    details: tuple[str, ...] = ()
    """Settings, the figures behind the ratio, how near they come to the machine's limits."""
    command: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the median is on the right side of the bar; None where there is no bar."""
        if self.bar is None:
            return None
        if self.at_most:
            return self.figure.median <= self.bar
        return self.figure.median >= self.bar

    def bar_text(self) -> str:
        """As in "≥ 10×"; nothing where there is no bar."""
        if self.bar is None:
            return ""
        return f"{'≤' if self.at_most else '≥'} {self._shown(self.bar)}"

    def figure_text(self) -> str:
        """As in "12.3× (11.9 to 12.6)"."""
        figure = self.figure
        median, *others = map(self._shown, (figure.median, figure.least, figure.most))
        return median if figure.least == figure.most else f"{median} ({' to '.join(others)})"

    def _shown(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * value:.3g} %"
        return f"{value:.3g}{self.unit}"

    def __str__(self) -> str:
        verdict = ""
        if self.bar is not None:
            verdict = f", bar {self.bar_text()}: {'reached' if self.reached else 'missed'}"
        lines = [
            f"{self.what}, against {self.against}: {self.figure_text()}{verdict}",
            *(f"  {detail}" for detail in self.details),
        ]
        return "\n".join(lines)


Benchmark = Callable[[Settings], list[Claim]]


def alternate(work: Mapping[str, Work], settings: Settings) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round, after one round that does not count.

    Every other round goes backwards, so that none always follows the same one.
    """
    for act in work.values():
        seconds(act, settings.device)
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(settings.rounds):
        names = list(work) if number % 2 == 0 else list(work)[::-1]
        for name in names:
            found[name].append(seconds(work[name], settings.device))
    return found


def seconds(act: Work, device: torch.device) -> float:
    """Do it once, and wait for the device."""
    _wait(device)
    begun = time.perf_counter()
    act()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_faster(peer: Sequence[float], own: Sequence[float], *, work: float = 1.0) -> Figure:
    """How many times faster `own` is: a peer that takes twice the seconds gives 2.

    `work` is how much the peer does in its seconds, in units of what we do in ours.
    """
    return Figure.of([theirs / work / ours for theirs, ours in zip(peer, own, strict=True)])


def run_command(
    doc: str | None, module: str, benchmarks: Mapping[str, Benchmark], arguments: list[str]
) -> None:
    """Measure what `python -m benchmarks.MODULE NAMES...` asks for (everything, by default)."""
    parser = argparse.ArgumentParser(description=doc, prog=f"python -m benchmarks.{module}")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(benchmarks)}; all by default")
    add_options(parser)
    parser.add_argument("--json", type=Path, help="also add the claims to this file, a line each")
    given = parser.parse_args(arguments)
    settings = settings_of(given)
    for name in given.names or benchmarks:
        if name not in benchmarks:
            parser.error(f"{name}: expected one of {', '.join(benchmarks)}")
        for claim in benchmarks[name](settings):
            print(claim, flush=True)
            if given.json:
                device = "" if given.device == "cpu" else f" --device {given.device}"
                command = f"python -m benchmarks.{module} {name}{device}"
                with given.json.open("a") as file:
                    file.write(json.dumps(asdict(claim) | {"command": command}) + "\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that `settings_of` reads."""
    parser.add_argument("--device", default="cpu", help="auto, cuda, mps or cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="for torch; as many as cores, by default")
    parser.add_argument("--toy", action="store_true", help="sizes that only try the commands out")


def settings_of(given: argparse.Namespace) -> Settings:
    """What was asked for; sets torch's threads, and memory as `drivesim` does, peers' too."""
    keep_freed_memory()
    torch.set_num_threads(given.threads or usable_cores())
    return Settings(device=resolve_device(given.device), rounds=given.rounds, toy=given.toy)


def read_claims(path: Path) -> list[Claim]:
    """The claims that commands have added to `path`."""
    claims = []
    for line in path.read_text().splitlines() if path.exists() else ():
        saved = json.loads(line)
        figure, details = Figure(**saved.pop("figure")), tuple(saved.pop("details"))
        claims.append(Claim(figure=figure, details=details, **saved))
    return claims
