"""`python -m benchmarks.bench`: every speed benchmark, and the table in docs/BENCHMARKS.md.

Each command runs in a process of its own, one after the other. If one fails, the others still run
and print what they find, and the table is left as it was.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.measuring.machine import describe
from benchmarks.measuring.paired import Claim, add_options, read_claims, settings_of
from driving_sim.engine.files import atomic_file

COMMANDS = (
    ("rollouts.speed", "tiny"),
    ("rollouts.speed", "base"),
    ("rollouts.video", "tiny"),
    ("rollouts.length", "tiny"),
    ("rollouts.futures", "tiny"),
    ("reading.encoding", "encoder"),
    ("reading.encoding", "tokenize"),
    ("training.speed", "tiny"),
    ("training.speed", "tokenizer"),
    ("reading.loading", "windows"),
    ("reading.loading", "share"),
    ("startup", "startup"),
)
"""Module and name of each benchmark."""
_VERDICTS = {True: "reached", False: "**missed**", None: ""}


def table(claims: Sequence[Claim], machine: str) -> str:
    """The claims as Markdown: a table, then what each command says beside its ratio."""
    rows = [
        "| what | against | bar | measured | | command |",
        "|---|---|---|---|---|---|",
        *(
            f"| {claim.what} | {claim.against} | {claim.bar_text()} | {claim.figure_text()} "
            f"| {_VERDICTS[claim.reached]} | `{claim.command}` |"
            for claim in claims
        ),
    ]
    details = [f"- {claim.what}: {line}" for claim in claims for line in claim.details]
    return "\n".join(
        [
            "# Speed",
            "",
            f"Measured by `make bench` on: {machine}.",
            "",
            "Each command runs both in one process, in turns; a ratio is the median over the "
            "rounds of each round's own, in brackets the least and the most. The peers are the "
            "`bench` extra's. Weights are random, but where videos are written: what a picture "
            "shows decides how long that takes.",
            "",
            *rows,
            "",
            "Behind the ratios:",
            "",
            *details,
            "",
        ]
    )


def measure(commands: Sequence[tuple[str, str]], options: Sequence[str]) -> list[Claim]:
    """Run the commands; `SystemExit` names those that failed, once all have run."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "claims.jsonl"
        for module, name in commands:
            arguments = ["-m", f"benchmarks.{module}", name, *options, "--json", str(file)]
            if subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode:
                failed.append(f"{module} {name}")
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}; the table was not written")
        return read_claims(file)


def write_table(path: Path, text: str) -> None:
    """Replace the table, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.bench")
    add_options(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "BENCHMARKS.md")
    given = parser.parse_args()
    options = [f"--device={given.device}", f"--rounds={given.rounds}"]
    options += [f"--threads={given.threads}"] if given.threads else []
    options += ["--toy"] if given.toy else []
    claims = measure(COMMANDS, options)
    write_table(given.out, table(claims, describe(settings_of(given))))
    barred = [claim for claim in claims if claim.bar is not None]
    reached = sum(claim.reached is True for claim in barred)
    print(f"{reached} of {len(barred)} bars reached -> {given.out}")


if __name__ == "__main__":
    main()
