"""Feed thousands of damaged and hostile inputs to drivesim, which may only raise its own errors.

    python -m tests.stress.fuzz [--inputs N] [--target NAME] [--seed S]

Each target makes a valid input. It then damages copies of it and passes them to the functions that
read such files from users. drivesim must accept an input, or refuse it with a `DriveSimError` of
one line. Anything else is a failure: another exception, more than `HANG_S` seconds, or a partly
written file. Input n depends only on (target, seed, n), so `--first n --inputs 1` repeats it.
"""

import argparse
import io
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from driving_sim.engine.errors import DriveSimError
from tests.stress.fuzz_targets import TARGETS, Attempt

HANG_S = 30
"""Seconds after which a test of an input counts as hanging."""
_LONGEST_MESSAGE = 4000
_UNSHOWABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]"
)  # control characters and lone surrogates
_SHOWN = 5


class Hang(BaseException):
    """Raised if an input takes too long."""


class BadOutcome(Exception):  # noqa: N818 - a verdict on the code under test
    """Raised for results that no user should see: messages of several lines, or partial files."""


@dataclass(kw_only=True)
class Tally:
    """Counts of the inputs of a target by result, and descriptions of the failures."""

    target: str
    tried: int = 0
    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.target:<12} {self.tried:>7} inputs: {self.accepted:>7} accepted, "
            f"{self.refused:>7} refused, {len(self.failures):>3} failures, {self.seconds:6.1f} s"
        )


def run(
    target: str,
    inputs: int,
    *,
    seed: int = 0,
    first: int = 0,
    seconds: float = float("inf"),
) -> Tally:
    """Try the inputs of a target from number `first` on.

    Stops after `inputs` inputs, or once `seconds` have passed.
    """
    tally = Tally(target=target)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="drivesim-fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, work = Path(folder, "whole"), Path(folder, "work")
        whole.mkdir()
        with _silent():
            attempt = TARGETS[target](whole)
        for number in range(first, first + inputs):
            if time.perf_counter() - begin > seconds:
                break
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            _try(tally, attempt, random.Random(f"{target} {seed} {number}"), work, number)
    tally.seconds = time.perf_counter() - begin
    return tally


def _try(tally: Tally, attempt: Attempt, rng: random.Random, work: Path, number: int) -> None:
    tally.tried += 1
    try:
        with _limited(HANG_S), _silent():
            refusal = _outcome(attempt, rng, work)
    except (Exception, Hang) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
        tally.failures.append(f"{number}: {what} ({place.filename}:{place.lineno})")
    else:
        tally.refused += refusal
        tally.accepted += not refusal


def _outcome(attempt: Attempt, rng: random.Random, work: Path) -> bool:
    """Return whether drivesim refused the input.

    Raises `BadOutcome` if it left a partial file or if its message is bad.
    """
    try:
        attempt(rng, work)
        refused = False
    except DriveSimError as error:
        check_message(str(error))
        refused = True
    leftovers = [path.name for path in work.rglob("*") if ".partial" in path.name]
    if leftovers:
        raise BadOutcome(f"left a partial file behind: {leftovers[0]}")
    return refused


def check_message(message: str) -> None:
    """Raise `BadOutcome` unless a message is one line that a terminal can show."""
    if not message.strip() or len(message.splitlines()) > 1 or len(message) > _LONGEST_MESSAGE:
        raise BadOutcome(f"the message is not one short line: {message[:200]!r}")
    if _UNSHOWABLE.search(message):
        raise BadOutcome(
            f"the message has characters that a terminal cannot show: {message[:200]!r}"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Hide everything that is printed."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    """Run the targets that the command line names; return 1 if any input failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000, help="inputs per target; default: 1000")
    parser.add_argument(
        "--target",
        action="append",
        choices=sorted(TARGETS),
        help="target to run; may be repeated; default: all",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first input; default: 0"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="maximum seconds per target"
    )
    options = parser.parse_args()
    tallies = []
    for name in options.target or TARGETS:
        tally = run(
            name, options.inputs, seed=options.seed, first=options.first, seconds=options.seconds
        )
        print(tally, flush=True)
        for failure in tally.failures[:_SHOWN]:
            print(f"  --target {name} --seed {options.seed} --inputs 1 --first {failure}")
        tallies.append(tally)
    tried = sum(tally.tried for tally in tallies)
    failed = sum(len(tally.failures) for tally in tallies)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{tried} inputs, {failed} failures, peak memory {memory:.0f} MB")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
