"""`python -m benchmarks.against REVISION`: this checkout's speed beside that of an earlier commit.

Both do the same work by the same commands, in turns, on synthetic drives: so whatever else the
machine does disturbs both. Printed are the medians and ranges of the rounds' ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import ROOT


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A working tree of `revision` in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def drivesim(tree: Path, folder: Path, *arguments: str) -> float:
    """Run a command of the code in `tree` within `folder`; return the seconds that it took."""
    command = [sys.executable, "-P", "-m", "driving_sim.cli", *arguments]
    begun = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return time.perf_counter() - begun


def measure(tree: Path, videos: Path, preset: str, steps: int) -> dict[str, float]:
    """The seconds of each command, run once."""
    training = ("--preset", preset, "--steps", str(steps))
    futures = ("--actions", "left", "--actions", "right", "--seconds", "6")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "train-tokenizer": drivesim(tree, folder, "train-tokenizer", str(videos), *training),
            "tokenize": drivesim(tree, folder, "tokenize", str(videos)),
            "train-world-model": drivesim(tree, folder, "train-world-model", *training),
            "rollout": drivesim(tree, folder, "rollout", *futures),
        }


def main() -> None:
    """Parse, measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.against")
    parser.add_argument("revision", help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--drives", type=int, default=8, help="of 20 s each")
    given = parser.parse_args()
    with checked_out(given.revision) as before, tempfile.TemporaryDirectory() as name:
        videos = Path(name) / "videos"
        drivesim(
            ROOT, Path(name), "synth", str(videos), "--drives", str(given.drives), "--seconds=20"
        )
        rounds = []
        for number in range(given.rounds):
            trees = [before, ROOT] if number % 2 == 0 else [ROOT, before]
            found = {tree: measure(tree, videos, given.preset, given.steps) for tree in trees}
            rounds.append((found[before], found[ROOT]))
    print(f"speed of this checkout over {given.revision}'s, {given.rounds} rounds: median (range)")
    for what in rounds[0][0]:
        ratios = [old[what] / new[what] for old, new in rounds]
        now = statistics.median(new[what] for _, new in rounds)
        print(
            f"  {what}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"now {now:.3g} s"
        )


if __name__ == "__main__":
    main()
