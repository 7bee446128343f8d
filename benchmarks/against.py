"""`python -m benchmarks.against REVISION`: compare this checkout's speed with an earlier commit's.

In each round, both checkouts run the same commands on the same synthetic drives, one checkout after
the other, so other load on the machine slows both. For each command, prints the earlier commit's
time divided by this checkout's time: its median and its range over the rounds.
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
    """Check `revision` out into a temporary working tree, and yield its folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def drivesim(tree: Path, folder: Path, *arguments: str) -> float:
    """Run a drivesim command from the checkout `tree` in `folder`. Return the seconds it took."""
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
    """Run each command of the checkout `tree` once. Return the seconds by command."""
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
    """Parse the options, time both checkouts in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.against")
    parser.add_argument("revision", help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; default: 5")
    parser.add_argument("--preset", default="tiny", help="size of the models; default: tiny")
    parser.add_argument("--steps", type=int, default=100, help="steps of a training; default: 100")
    parser.add_argument("--drives", type=int, default=8, help="drives of 20 s each; default: 8")
    options = parser.parse_args()
    with checked_out(options.revision) as before, tempfile.TemporaryDirectory() as name:
        videos = Path(name) / "videos"
        drivesim(
            ROOT, Path(name), "synth", str(videos), "--drives", str(options.drives), "--seconds=20"
        )
        rounds = []
        for number in range(options.rounds):
            trees = [before, ROOT] if number % 2 == 0 else [ROOT, before]
            times = {tree: measure(tree, videos, options.preset, options.steps) for tree in trees}
            rounds.append((times[before], times[ROOT]))
    print(
        f"speed of this checkout over that of {options.revision}, "
        f"{options.rounds} rounds: median (range)"
    )
    for what in rounds[0][0]:
        ratios = [old[what] / new[what] for old, new in rounds]
        now = statistics.median(new[what] for _, new in rounds)
        print(
            f"  {what}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"now {now:.3g} s"
        )


if __name__ == "__main__":
    main()
