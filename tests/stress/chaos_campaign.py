"""One run that is killed again and again, looked at after every kill, and compared in the end."""

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
"""How a run is stopped, SIGKILL where nothing else is said, and how often."""
DAMAGES = ("truncated", "flipped", "emptied", "removed")


@dataclass(frozen=True, slots=True)
class Kill:
    """One of `KINDS`, after `at` seconds or at file operation number `at`."""

    kind: str
    at: float
    within: str = ""
    """The folder in the run's whose operations count."""

    @property
    def signal(self) -> int:
        """What is sent."""
        return signal.SIGTERM if "SIGTERM" in self.kind else signal.SIGKILL

    @property
    def is_at_operation(self) -> bool:
        """Whether at a file operation."""
        return "operation" in self.kind


@dataclass(kw_only=True, slots=True)
class Figures:
    """What came of killing a job."""

    kills: Counter[str] = field(default_factory=Counter)
    """Kills survived, by kind."""
    damages: Counter[str] = field(default_factory=Counter)
    """Damaged checkpoints survived, by kind."""
    runs: int = 0
    """Runs that came to their end."""
    operations: int = 0
    """File operations of a run that is not killed."""
    operations_killed: int = 0
    """Those that a run was killed at, first of all."""
    unit: str
    """What work is counted in."""
    done_over: int = 0
    """Most work that a kill cost where no checkpoint was damaged."""
    done_over_allowed: int
    """Most that it may cost."""
    done_over_in_all: int = 0
    """All that kills cost."""
    bytes_lost: int = 0
    """Bytes that were committed, and after a kill gone or changed with nothing in their place."""
    bytes_different: int = 0
    """Bytes by which results differ from those of the run that was not killed."""
    problems: list[str] = field(default_factory=list)
    """Everything else that should not be."""

    @property
    def failed(self) -> bool:
        """Whether anything is as it should not be."""
        return bool(self.bytes_lost or self.bytes_different or self.problems)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


class Target:
    """A job and its uninterrupted run."""

    def __init__(self, servers: Sequence[Server], job: Job, out: Path) -> None:
        self.job, self._log = job, out.with_name(f"{out.name}.log")
        # Forks of one process hash alike, as separate runs do not: so they take turns.
        self._servers = itertools.cycle(servers)
        self.whole, self.ended = self.run(out)
        if self.ended.status != 0:
            raise RuntimeError(f"{job.name} fails by itself: {self.whole.printed}")

    def on(self, server: Server) -> Self:
        """The same with processes of another server."""
        other = copy.copy(self)
        other._servers = itertools.cycle([server])
        return other

    def run(
        self, out: Path, kill: Kill | None = None, *, file_limit: int | None = None
    ) -> tuple[State, Ended]:
        """Begin or continue the job in `out`, and kill it; return what it left."""
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
        """Of no kills yet."""
        return Figures(
            operations=self.ended.operations,
            unit=self.job.unit,
            done_over_allowed=self.job.allowed,
        )

    def kills(self, draw: random.Random, count: int) -> Iterator[Kill]:
        """`count` kills that are likely to reach into a run, each some way on."""
        reach = 2 / (count + 1)
        for _ in range(count):
            kind, *_ = draw.choices(list(KINDS), list(KINDS.values()))
            share = draw.uniform(0, reach)
            if "operation" in kind:
                yield Kill(kind, 1 + int(self.ended.operations * share))
            else:
                yield Kill(kind, self.ended.seconds * share)


class Campaign:
    """One run in a folder of its own, killed until no kill is left, then left to end.

    After a `share` of the kills its newest checkpoint is damaged, if there is one before it.
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
        """Whether it all went well; what did not is in the figures."""
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
        """Checkpoints that damage left, as it left them or with even less in them."""
        return {
            step
            for step, then in self._damaged.items()
            if step in state.checkpoints
            and _checkpoint(state, step).items() <= _checkpoint(then, step).items()
        }

    def _check(
        self, kept: int, before: State, after: State, kill: Kill | None, ended: Ended
    ) -> None:
        """Everything that must hold whenever a process ended."""
        bad = self._bad_steps(before)
        expected = {0} | ({-kill.signal} if kill else set())
        if kill and kill.signal == signal.SIGTERM:
            expected.add(128 + signal.SIGTERM)
        if ended.status not in expected and not self._job.is_over(ended.status, after):
            self._problem(f"ended with {ended.status}", after)
        if "Traceback" in after.printed:
            self._problem("a traceback", after)
        self._check_saying(bad, kept, after, kill is None or ended.status >= 0)
        for name in torn(after):
            if not any(_is_in(name, step) for step in self._bad_steps(after)):
                self._problem(f"{name} is not whole", after)
        for trace in self._job.done_over(kept, before, after):
            self._problem(f"done again though it was kept: {trace}", after)
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
        """A damaged newest checkpoint is named in one line, and nothing else is called damaged."""
        said = [line for line in after.printed.splitlines() if "is damaged" in line]
        newest = max(bad, default=0)
        if to_its_end and newest > kept and sum(f"step-{newest:08d}" in x for x in said) != 1:
            self._problem(f"damage of step {newest} is not said in one line", after)
        if said and not bad:
            self._problem(f"says {said[0]!r}", after)

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
                self._problem(f"{cost} {self._job.unit} must be done over", state)
        if "; to go on, " in state.printed and cost:
            self._problem(f"said that it saved, but {cost} {self._job.unit} are gone", state)

    def _damage(self, state: State) -> State:
        """Damage the newest checkpoint where there is one before it."""
        whole = checkpoint_steps(state)
        if not isinstance(self._job, Training) or self._bad_steps(state) or len(whole) < 2:
            return state
        kind = self._draw.choice(self._damages)
        folder = self._out / f"{CHECKPOINTS}{whole[-1]:08d}"
        damage(folder, kind, self._draw)
        self._story.append(f"step {whole[-1]} {kind}")
        self._figures.damages[kind] += 1
        state = state_of(self._out, state.printed)
        self._damaged = {whole[-1]: state}
        return state

    def _compare(self, state: State) -> None:
        """What is there in the end with what should be."""
        found, expected = (self._job.result(each) for each in (state, self._target.whole))
        self._figures.runs += 1
        for name in sorted(found.keys() | expected.keys()):
            count = differing(found.get(name, b""), expected.get(name, b""))
            self._figures.bytes_different += count
            if count or name not in found or name not in expected:
                self._problem(f"{name} differs in {count} bytes in the end", state)
        for path in self._out.parent.rglob(".*"):
            self._problem(f"left over: {path.relative_to(self._out.parent)}", state)


def _is_in(name: str, step: int) -> bool:
    return name.startswith(f"{CHECKPOINTS}{step:08d}/")


def _checkpoint(state: State, step: int) -> dict[str, File]:
    return {name: file for name, file in state.files.items() if _is_in(name, step)}


def damage(folder: Path, kind: str, draw: random.Random) -> None:
    """Harm a checkpoint as disks and people do."""
    paths = sorted(folder.iterdir())
    path = draw.choice(paths)
    if kind == "emptied":
        for each in paths:
            each.unlink()
    elif kind == "removed":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    else:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def differing(one: bytes, other: bytes) -> int:
    """Bytes by which two contents differ, what one has more included."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
