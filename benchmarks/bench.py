"""`python -m benchmarks.bench`: run every speed benchmark and update docs/speed.md.

Each benchmark runs in its own process, one after the other. The page docs/speed.md has a section
for each machine. The new results replace this machine's section, or become a new section. If a
benchmark fails, the remaining ones still run and print their results, but the page is not changed.
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.measuring.machine import describe, machine_name
from benchmarks.measuring.paired import Claim, add_options, read_claims, settings_of
from driving_sim.engine.files import atomic_file

COMMANDS = (
    ("rollouts.speed", "tiny"),
    ("rollouts.speed", "base"),
    ("rollouts.video", "tiny"),
    ("rollouts.length", "tiny"),
    ("rollouts.futures", "tiny"),
    ("rollouts.session", "synthetic"),
    ("rollouts.env", "tiny"),
    ("reading.encoding", "encoder"),
    ("reading.encoding", "tokenize"),
    ("training.speed", "tiny"),
    ("training.speed", "tokenizer"),
    ("reading.loading", "windows"),
    ("reading.loading", "share"),
    ("startup", "startup"),
)
"""Module and benchmark name of each command to run."""
_END = "<!-- end of make bench: "
"""Start of the comment that ends a section of the page; the machine's name follows."""
_HEAD = ("what", "drivesim", "compared with", "times as fast", "share of the machine's limits")


def section(machine: str, measured: str, claims: Sequence[Claim]) -> str:
    """Return a machine's section of the page as Markdown, with comments that mark start and end.

    `measured` is the line below the heading: date, commit, the machine's limits, and versions.
    """
    rows = ["| " + " | ".join(cells) + " |" for cells in (_HEAD, *(c.cells() for c in claims))]
    rows.insert(1, "|---" * len(_HEAD) + "|")
    lines = [_begin(machine), f"## {machine}", "", measured, "", *rows, "", verdict(claims)]
    return "\n".join([*lines, _end(machine)])


def verdict(claims: Sequence[Claim]) -> str:
    """Return a text that counts the bars (goals) that were reached and lists the missed ones."""
    with_bar = [claim for claim in claims if claim.bar is not None]
    missed = [claim for claim in with_bar if not claim.reached]
    text = f"{len(with_bar) - len(missed)} of {len(with_bar)} bars reached."
    if missed:
        figures = (
            f"{claim.what}, {claim.figure_text().partition(' (')[0]} (bar {claim.bar_text()})"
            for claim in missed
        )
        text += f" Missed: {'; '.join(figures)}."
    return text


def with_section(page: str, machine: str, text: str) -> str:
    """Return the page with `text` as the section of the machine.

    It replaces the machine's old section, or comes after the last section if there is none.
    """
    begin, end = _begin(machine), _end(machine)
    if begin in page:
        before, _, rest = page.partition(begin)
        _, end_comment, after = rest.partition(end)
        if not end_comment:
            raise SystemExit(f"the page has {begin} but not {end}; add it below the table")
        return before + text + after
    last_end = page.rfind(_END)
    if last_end < 0:
        return f"{page.rstrip()}\n\n{text}\n".lstrip()
    at = page.index("-->", last_end) + len("-->")
    return f"{page[:at]}\n\n{text}{page[at:]}"


def _begin(machine: str) -> str:
    return f"<!-- make bench: {machine} -->"


def _end(machine: str) -> str:
    return f"{_END}{machine} -->"


def commit() -> str:
    """Return the short hash of the checked-out commit, with "-dirty" if files have changed."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


def measure(commands: Sequence[tuple[str, str]], options: Sequence[str]) -> list[Claim]:
    """Run the benchmarks and return their claims.

    If benchmarks fail, raises SystemExit with their names after all benchmarks have run.
    """
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "claims.jsonl"
        for module, name in commands:
            arguments = ["-m", f"benchmarks.{module}", name, *options, "--json", str(file)]
            if subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode:
                failed.append(f"{module} {name}")
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}; the page (--out) was not changed")
        return read_claims(file)


def update_page(path: Path, machine: str, text: str) -> None:
    """Write a machine's section into the page. If that fails, the page stays as it was."""
    page = path.read_text("utf-8") if path.exists() else ""
    with atomic_file(path) as temporary:
        temporary.write_text(with_section(page, machine, text), "utf-8")


def main() -> None:
    """Parse the options, measure, and update the page."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.bench")
    add_options(parser)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "speed.md", help="page to update"
    )
    parser.add_argument("--machine", help="heading of the section; default: processor and threads")
    options = parser.parse_args()
    arguments = [f"--device={options.device}", f"--rounds={options.rounds}"]
    arguments += [f"--threads={options.threads}"] if options.threads else []
    arguments += ["--toy"] if options.toy else []
    measured = f"{datetime.datetime.now(datetime.UTC).date()}, commit {commit()}."
    claims = measure(COMMANDS, arguments)
    settings = settings_of(options)
    machine = options.machine or machine_name(settings)
    text = section(machine, f"{measured} {describe(settings)}", claims)
    update_page(options.out, machine, text)
    print(f"{verdict(claims)} -> {options.out}")


if __name__ == "__main__":
    main()
