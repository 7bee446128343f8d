"""Kill runs again and again, and compare their results with those of uninterrupted runs.

`python -m tests.stress.chaos` kills both trainings and `tokenize`, mostly with SIGKILL and
sometimes with SIGTERM. They run at toy sizes and in separate processes. They are killed at random
moments and before every file operation, so a crash is tried at every point between two changes to
files. After a kill, the same command continues the run, and may be killed again. Sometimes the
newest checkpoint is damaged in between. In the end, the weights, the checkpoint, the metrics and
the token store must equal those of an uninterrupted run, byte for byte. The exit code is 1 if
anything is lost, left over or different.
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
"""Number of problems after which a job is not started again."""


class Chaos:
    """Kills jobs in `folder`. `seed` determines everything except the exact moments of kills."""

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
        """Run a job again and again, and kill it `kills` times or until the monotonic time `until`.

        Each run is killed `per_run` times, or one to four times if `per_run` is 0. With `sweep`,
        the first kill of every run is at a different file operation, until each operation was
        tried.
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
    """Return the figures as a text table with one line for each job."""
    header = (
        f"{'job':18}{'kills survived':>15}{'moment':>8}{'operation':>10}{'SIGTERM':>8}"
        f"{'damaged':>8}{'runs':>6}{'done over':>16}{'bytes lost':>11}{'different':>10}"
    )
    lines = [header]
    for name, job in figures.items():
        terms = sum(count for kind, count in job.kills.items() if "SIGTERM" in kind)
        kinds = f"{job.kills['moment']:8}{job.kills['operation']:10}{terms:8}"
        over = f"{job.done_over} of {job.done_over_allowed} {job.unit}"
        lines.append(
            f"{name:18}{job.kills.total():15}{kinds}{job.damages.total():8}{job.runs:6}"
            f"{over:>16}{job.bytes_lost:11}{job.bytes_different:10}"
        )
        if job.operations_killed:
            share = f"{job.operations_killed} of its {job.operations}"
            lines.append(f"{'':18}first killed at {share} file operations")
        lines += [f"    {problem}" for problem in job.problems]
    return "\n".join(lines)


def main() -> int:
    """Parse the options, kill the jobs, print the table; return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.chaos", description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=500, help="number of kills of each job; default: 500"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after this many seconds"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--job", action="append", help="kill only this job; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    start = time.monotonic()
    figures: dict[str, Figures] = {}
    with Server() as first, Server() as second:
        chaos = Chaos([first, second], folder, options.seed)
        names = options.job or list(chaos.targets)
        for number, name in enumerate(names, start=1):
            until = start + options.seconds * number / len(names)
            figures[name] = chaos.kill(name, options.kills, sweep=True, until=until)
            print(f"{name}: {figures[name].kills.total()} kills", file=sys.stderr, flush=True)
    failed = any(job.failed for job in figures.values())
    if failed:
        print(f"the files of failed runs are in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    if options.json:
        print(json.dumps({name: job.to_dict() for name, job in figures.items()}, indent=2))
    else:
        print(table(figures))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
