"""Kill runs at random until they are over, and compare them with runs that were left alone.

`python -m tests.stress.chaos` kills both trainings and `tokenize` (toy sizes, separate processes,
SIGKILL): at random moments, and before every single file operation that they make, so that each
crash point of their writers is tried. After a kill the same command goes on, sometimes to be killed
again; now and then the newest checkpoint is damaged in between. In the end the weights, the
checkpoint, the metrics and the token store must be, byte for byte, those of a run that nobody
touched. Exits with 1 where anything is lost, left over or different.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.stress.chaos_campaign import Campaign, Figures, Kill, Target
from tests.stress.chaos_jobs import make_jobs, make_videos
from tests.stress.chaos_worker import Server

MOST_PROBLEMS = 10
"""After so many a job is left alone."""


class Chaos:
    """Kills jobs in `folder`; what happens is a function of the seed, but for the moments."""

    def __init__(self, servers: Sequence[Server], folder: Path, seed: int = 0) -> None:
        make_videos(folder)
        self._folder, self._seed = folder, seed
        self.targets = {
            job.name: Target(servers, job, folder / job.makes) for job in make_jobs(folder)
        }

    def kill(
        self,
        name: str,
        kills: int,
        *,
        per_run: int = 0,
        sweep: bool = False,
        until: float = float("inf"),
    ) -> Figures:
        """Kill a job `kills` times, or until the monotonic time `until`.

        Each run is killed `per_run` times, by default once to four times; with `sweep` first at an
        operation that none was first killed at, as long as there is one.
        """
        target, draw = self.targets[name], random.Random(f"{name} {self._seed}")
        in_turn = list(range(1, target.ended.operations + 1)) if sweep else []
        draw.shuffle(in_turn)
        figures = target.figures()
        while (left := kills - figures.kills.total()) > 0 and time.monotonic() < until:
            if len(figures.problems) >= MOST_PROBLEMS:
                break
            own = list(target.kills(draw, min(left, per_run or draw.randint(1, 4))))
            if in_turn:
                own[0] = Kill("operation", in_turn.pop())
                figures.operations_killed += 1
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._folder))
            if Campaign(target, folder, figures, draw).run(own):
                shutil.rmtree(folder)
        return figures


def table(figures: dict[str, Figures]) -> str:
    """The figures as text, a line for each job."""
    header = (
        f"{'job':18}{'kills survived':>15}{'moment':>8}{'operation':>10}{'SIGTERM':>8}"
        f"{'damaged':>8}{'runs':>6}{'done over':>16}{'bytes lost':>11}{'different':>10}"
    )
    lines = [header]
    for name, each in figures.items():
        terms = sum(count for kind, count in each.kills.items() if "SIGTERM" in kind)
        kinds = f"{each.kills['moment']:8}{each.kills['operation']:10}{terms:8}"
        over = f"{each.done_over} of {each.done_over_allowed} {each.unit}"
        lines.append(
            f"{name:18}{each.kills.total():15}{kinds}{each.damages.total():8}{each.runs:6}"
            f"{over:>16}{each.bytes_lost:11}{each.bytes_different:10}"
        )
        if each.operations_killed:
            share = f"{each.operations_killed} of its {each.operations}"
            lines.append(f"{'':18}first killed at {share} file operations")
        lines += [f"    {problem}" for problem in each.problems]
    return "\n".join(lines)


def main() -> int:
    """Parse, kill, print; 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=500, help="of each job (500)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", action="append", help="only this one; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    start = time.monotonic()
    figures: dict[str, Figures] = {}
    with Server() as one, Server() as other:
        chaos = Chaos([one, other], folder, options.seed)
        names = options.job or list(chaos.targets)
        for number, name in enumerate(names, start=1):
            until = start + options.seconds * number / len(names)
            figures[name] = chaos.kill(name, options.kills, sweep=True, until=until)
            print(f"{name}: {figures[name].kills.total()} kills", file=sys.stderr, flush=True)
    failed = any(each.failed for each in figures.values())
    if failed:
        print(f"what failed is in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    if options.json:
        print(json.dumps({name: each.to_dict() for name, each in figures.items()}, indent=2))
    else:
        print(table(figures))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
