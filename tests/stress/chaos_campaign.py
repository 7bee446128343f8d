"""Kill one run again and again, check it after every kill, and compare its results in the end."""

import copy
import itertools
import random
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from tests.stress.chaos_jobs import (
    CHECKPOINTS,
    File,
    Job,
    State,
    Training,
    checkpoint_steps,
    state_of,
    torn,
)
from tests.stress.chaos_worker import Ended, Request, Server

KINDS = {"moment": 9, "operation": 9, "SIGTERM": 1, "SIGTERM at operation": 1}
"""Kinds of kills, with their relative frequency. Kinds without a signal use SIGKILL."""
DAMAGES = ("truncated", "flipped", "emptied", "removed")


@dataclass(frozen=True, slots=True)
class Kill:
    """A signal that stops a run.

    `kind` is a key of `KINDS`. `at` is a time in seconds, or the number of a file operation if the
    name of the kind contains "operation".
    """

    kind: str
    at: float
    within: str = ""
    """Subfolder of the run in which file operations are counted; "" for the whole run."""

    @property
    def signal(self) -> int:
        """Number of the signal to send."""
        return signal.SIGTERM if "SIGTERM" in self.kind else signal.SIGKILL

    @property
    def is_at_operation(self) -> bool:
        """Whether the signal is sent at a file operation. Otherwise it is sent after a time."""
        return "operation" in self.kind


@dataclass(kw_only=True, slots=True)
class Figures:
    """Results of killing a job."""

    kills: Counter[str] = field(default_factory=Counter)
    """Number of kills that the job survived, by kind."""
    damages: Counter[str] = field(default_factory=Counter)
    """Number of damaged checkpoints that the job survived, by kind of damage."""
    runs: int = 0
    """Number of runs that finished."""
    operations: int = 0
    """Number of file operations in an uninterrupted run."""
    operations_killed: int = 0
    """Number of file operations that were tried as the first kill of a run."""
    unit: str
    """Unit of work, as in "steps"."""
    done_over: int = 0
    """Most work that had to be repeated after a kill, not counting damaged checkpoints."""
    done_over_allowed: int
    """Most work that a kill may cause to be repeated."""
    done_over_in_all: int = 0
    """Sum of the work that had to be repeated after all kills."""
    bytes_lost: int = 0
    """Number of committed bytes that a kill deleted or changed and that no other file replaces."""
    bytes_different: int = 0
    """Number of bytes in which results differ from those of the uninterrupted run."""
    problems: list[str] = field(default_factory=list)
    """Descriptions of all problems."""

    @property
    def failed(self) -> bool:
        """Whether anything went wrong."""
        return bool(self.bytes_lost or self.bytes_different or self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary for JSON."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


class Target:
    """A job, and what its uninterrupted run left behind."""

    def __init__(self, servers: Sequence[Server], job: Job, out: Path) -> None:
        self.job, self._log = job, out.with_name(f"{out.name}.log")
        # Processes forked from the same server have the same seed of `hash`, but the runs of a user
        # do not. So alternate between several servers.
        self._servers = itertools.cycle(servers)
        self.whole, self.ended = self.run(out)
        if self.ended.status != 0:
            raise RuntimeError(f"{job.name} fails without a kill: {self.whole.printed}")

    def on(self, server: Server) -> Self:
        """Return a copy of the target that runs its processes on `server`."""
        target = copy.copy(self)
        target._servers = itertools.cycle([server])
        return target

    def run(
        self, out: Path, kill: Kill | None = None, *, file_limit: int | None = None
    ) -> tuple[State, Ended]:
        """Start or continue the job in `out`, and kill it if `kill` is given.

        Returns the files and output that the process left behind, and how it ended.
        """
        kill = kill or Kill("operation", 0)
        request = Request(
            command=self.job.command(out),
            log=self._log,
            watched=out / kill.within,
            signal_at=int(kill.at) if kill.is_at_operation else 0,
            after=None if kill.is_at_operation else kill.at,
            signal=kill.signal,
            file_limit=file_limit,
        )
        ended = next(self._servers).run(request)
        return state_of(out, self._log.read_text("utf-8", "replace")), ended

    def figures(self) -> Figures:
        """Return figures of this target in which nothing has been counted yet."""
        return Figures(
            operations=self.ended.operations,
            unit=self.job.unit,
            done_over_allowed=self.job.allowed,
        )

    def kills(self, draw: random.Random, count: int) -> Iterator[Kill]:
        """Draw `count` kills for one run. They come so early that all of them probably happen."""
        reach = 2 / (count + 1)
        for _ in range(count):
            kind, *_ = draw.choices(list(KINDS), list(KINDS.values()))
            share = draw.uniform(0, reach)
            if "operation" in kind:
                yield Kill(kind, 1 + int(self.ended.operations * share))
            else:
                yield Kill(kind, self.ended.seconds * share)


class Campaign:
    """One run in a folder of its own, which is killed several times and then left to finish.

    After each kill, the newest checkpoint is damaged with probability `share` if there is an older
    one.
    """

    def __init__(
        self,
        target: Target,
        folder: Path,
        figures: Figures,
        draw: random.Random,
        *,
        share: float = 0.5,
        damages: Sequence[str] = DAMAGES,
    ) -> None:
        self._target, self._job, self._out = target, target.job, folder / "out"
        self._figures, self._draw, self._share, self._damages = figures, draw, share, damages
        self._damaged: dict[int, State] = {}
        self._story: list[str] = []

    def run(self, kills: Iterable[Kill]) -> bool:
        """Kill and continue the run until it is finished. Return whether there were no problems.

        Problems are added to the figures.
        """
        before = len(self._figures.problems)
        state = State(files={}, rows=(), printed="")
        try:
            self._run([*kills, None], state)
        except TimeoutError as error:
            self._problem(str(error), state)
        return len(self._figures.problems) == before

    def _run(self, kills: Iterable[Kill | None], state: State) -> None:
        before = len(self._figures.problems)
        for kill in kills:
            kept = self._job.mark(state, self._bad_steps(state)).kept
            state_before, (state, ended) = state, self._target.run(self._out, kill)
            self._story.append(f"{kill} -> {ended.status} after {ended.operations} operations")
            self._check(kept, state_before, state, kill, ended)
            if self._job.is_over(ended.status, state):
                self._compare(state)
                return
            if kill is None or len(self._figures.problems) > before:
                return
            self._count(kill, state)
            if self._draw.random() < self._share:
                state = self._damage(state)

    def _problem(self, what: str, state: State) -> None:
        last = state.printed.strip().rpartition("\n")[2]
        story = "; ".join(self._story)
        self._figures.problems.append(f"{self._job.name}: {what} [{story}] printed: {last}")

    def _bad_steps(self, state: State) -> set[int]:
        """Return the steps of damaged checkpoints that the run has not replaced yet."""
        return {
            step
            for step, then in self._damaged.items()
            if step in state.checkpoints
            and _checkpoint(state, step).items() <= _checkpoint(then, step).items()
        }

    def _check(
        self, kept: int, before: State, after: State, kill: Kill | None, ended: Ended
    ) -> None:
        """Check everything that must hold whenever a process has ended."""
        bad = self._bad_steps(before)
        expected = {0} | ({-kill.signal} if kill else set())
        if kill and kill.signal == signal.SIGTERM:
            expected.add(128 + signal.SIGTERM)
        if ended.status not in expected and not self._job.is_over(ended.status, after):
            self._problem(f"ended with {ended.status}", after)
        if "Traceback" in after.printed:
            self._problem("printed a traceback", after)
        self._check_saying(bad, kept, after, kill is None or ended.status >= 0)
        for name in torn(after):
            if not any(_is_in(name, step) for step in self._bad_steps(after)):
                self._problem(f"{name} is incomplete", after)
        for trace in self._job.done_over(kept, before, after):
            self._problem(f"repeated work that was saved: {trace}", after)
        healthy = State(
            files={n: f for n, f in before.files.items() if not any(_is_in(n, s) for s in bad)},
            rows=before.rows,
            printed="",
        )
        lost = self._job.lost(healthy, after)
        self._figures.bytes_lost += lost
        if lost:
            self._problem(f"{lost} bytes lost", after)

    def _check_saying(self, bad: set[int], kept: int, after: State, to_its_end: bool) -> None:
        """Check what the process printed about damaged checkpoints.

        If the newest checkpoint was damaged, one line must say so. If none was damaged, no line may
        report damage.
        """
        said = [line for line in after.printed.splitlines() if "is damaged" in line]
        newest = max(bad, default=0)
        if to_its_end and newest > kept and sum(f"step-{newest:08d}" in x for x in said) != 1:
            self._problem(f"the damage of step {newest} is not reported in one line", after)
        if said and not bad:
            self._problem(f"reports damage where there is none: {said[0]!r}", after)

    def _count(self, kill: Kill, state: State) -> None:
        bad = self._bad_steps(state)
        mark = self._job.mark(state, bad)
        cost = mark.done - mark.kept
        figures = self._figures
        figures.kills[kill.kind] += 1
        figures.done_over_in_all += cost
        if not bad:
            figures.done_over = max(figures.done_over, cost)
            if cost > self._job.allowed:
                self._problem(f"{cost} {self._job.unit} must be repeated", state)
        if "; to continue, " in state.printed and cost:
            self._problem(f"reported that it saved, but lost {cost} {self._job.unit}", state)

    def _damage(self, state: State) -> State:
        """Damage the newest checkpoint if there is an older one. Return the state after that."""
        steps = checkpoint_steps(state)
        if not isinstance(self._job, Training) or self._bad_steps(state) or len(steps) < 2:
            return state
        kind = self._draw.choice(self._damages)
        folder = self._out / f"{CHECKPOINTS}{steps[-1]:08d}"
        damage(folder, kind, self._draw)
        self._story.append(f"step {steps[-1]} {kind}")
        self._figures.damages[kind] += 1
        state = state_of(self._out, state.printed)
        self._damaged = {steps[-1]: state}
        return state

    def _compare(self, state: State) -> None:
        """Compare the final results with those of the uninterrupted run."""
        actual, expected = self._job.result(state), self._job.result(self._target.whole)
        self._figures.runs += 1
        for name in sorted(actual.keys() | expected.keys()):
            count = differing(actual.get(name, b""), expected.get(name, b""))
            self._figures.bytes_different += count
            if count or name not in actual or name not in expected:
                self._problem(f"{name} differs in {count} bytes in the end", state)
        for path in self._out.parent.rglob(".*"):
            self._problem(f"left over: {path.relative_to(self._out.parent)}", state)


def _is_in(name: str, step: int) -> bool:
    return name.startswith(f"{CHECKPOINTS}{step:08d}/")


def _checkpoint(state: State, step: int) -> dict[str, File]:
    return {name: file for name, file in state.files.items() if _is_in(name, step)}


def damage(folder: Path, kind: str, draw: random.Random) -> None:
    """Damage a checkpoint folder in one of the ways that `DAMAGES` lists."""
    paths = sorted(folder.iterdir())
    path = draw.choice(paths)
    if kind == "emptied":
        for file in paths:
            file.unlink()
    elif kind == "removed":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    else:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def differing(left: bytes, right: bytes) -> int:
    """Return the number of bytes in which two contents differ, plus their difference in length."""
    return sum(a != b for a, b in zip(left, right, strict=False)) + abs(len(left) - len(right))
