"""Runs `drivesim` commands in processes of their own that can be killed.

`python -m tests.stress.chaos_worker` imports everything once and then forks a process for each
request: real processes, real kills, milliseconds to start. A request is a line of JSON on stdin
(see `Request`); two lines answer it: the process's id once it is there, and its end.
"""

import gc
import itertools
import json
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from tests import ROOT

PATIENCE = 120.0
"""Seconds after which a process that does not end hangs."""
SHARD_BYTES = 1500
"""A shard holds a few of the toy drives, so that parts become shards along the way."""

# What shutil does comes down to these; `os.replace` is a rename.
_CHANGES = frozenset(
    ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
)
_HIDDEN = ("torch._dynamo", "typer._adapters")
"""What an optimiser imports when it is made (2 s), and typer at its first call."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A command to run, and how it is to be hindered."""

    command: tuple[str, ...]
    """Arguments of `drivesim`."""
    log: Path
    """What the process prints goes here."""
    watched: Path
    """The folder whose file operations are counted."""
    signal_at: int = 0
    """It gets the signal at its n-th operation that changes the watched folder; 0: never."""
    after: float | None = None
    """It gets the signal after so many seconds, if it is still there."""
    signal: int = signal.SIGKILL
    """The signal."""
    file_limit: int | None = None
    """Most bytes in a file that it writes: a full disk where none can be made."""

    def to_json(self) -> bytes:
        """One line."""
        return json.dumps(asdict(self), default=str).encode() + b"\n"

    @classmethod
    def from_json(cls, line: str) -> Self:
        """What `to_json` gave."""
        values: dict[str, Any] = json.loads(line)
        values |= {name: Path(values[name]) for name in ("log", "watched")}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    status: int
    """Its exit code, or minus the signal that ended it."""
    operations: int
    """How often it changed the watched folder, counting the one it was killed at."""
    seconds: float
    """From its start to its end."""


class Server:
    """The forking process as its user sees it; a context manager. `prefix` goes before it."""

    def __init__(self, *prefix: str) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.stress.chaos_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            # OpenMP does not survive a fork once it has threads.
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            bufsize=0,  # an answer that was read ahead could not be waited for
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._input.close()
        self._process.wait(PATIENCE)
        self._output.close()

    @property
    def pid(self) -> int:
        """The forking process's id."""
        return self._process.pid

    def run(self, request: Request) -> Ended:
        """Run to the end. Raises TimeoutError where there is none."""
        self._input.write(request.to_json())
        pid = self._answer()["pid"]
        start = time.monotonic()
        if request.after is not None and not self._answers_within(request.after):
            _send(pid, request.signal)
        if not self._answers_within(PATIENCE):
            _send(pid, signal.SIGKILL)
            self._answer()
            raise TimeoutError(f"{' '.join(request.command)} hung for {PATIENCE:g} s")
        answer = self._answer()
        return Ended(answer["status"], answer["operations"], time.monotonic() - start)

    def _answers_within(self, seconds: float) -> bool:
        return bool(select.select([self._output], [], [], seconds)[0])

    def _answer(self) -> dict[str, int]:
        line = self._output.readline()
        if not line:
            raise RuntimeError("the forking process ended: see its message above")
        answer: dict[str, int] = json.loads(line)
        return answer


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it ended by itself just now
        os.kill(pid, number)


def _serve() -> None:
    """Fork for each request until there are no more; a fork returns with what it is to run."""
    app = _import_all()
    operations = memoryview(mmap.mmap(-1, 8)).cast("q")  # shared with the forks
    # What was imported is not touched again: pages that forks do not write they need not copy.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        operations[0] = 0
        pid = os.fork()
        if pid == 0:
            _become(app, Request.from_json(line), operations)
        _say({"pid": pid})
        _, status = os.waitpid(pid, 0)
        _say({"status": os.waitstatus_to_exitcode(status), "operations": operations[0]})


def _say(answer: dict[str, int]) -> None:
    print(json.dumps(answer), flush=True)


def _import_all() -> Callable[[list[str]], None]:
    """All that the commands import on their way; nothing is computed, so there are no threads."""
    from driving_sim import pipeline
    from driving_sim.cli import app
    from driving_sim.tokenizer.tokenize import tokenize

    for hidden in _HIDDEN:
        with suppress(ImportError):
            import_module(hidden)
    vars(pipeline)["tokenize"] = partial(tokenize, shard_bytes=SHARD_BYTES)
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, "a thread would not be forked"
    return app


def _become(app: Callable[[list[str]], None], request: Request, operations: Any) -> NoReturn:
    """In the fork: run the command and end as it does."""
    import torch

    log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    if request.file_limit is not None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (request.file_limit, limit))
    sys.addaudithook(Watch(request, operations))
    status = 1
    try:
        app(list(request.command))
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    # As multiprocessing's forks end: an interpreter with torch takes longer to end than the run.
    os._exit(status)


class Watch:
    """An audit hook that counts operations which change a folder, and sends a signal at one.

    Python raises the event before the operation, so that a killed process does not come to it. A
    file that it was about to begin anew is left as empty as if it had.
    """

    def __init__(self, request: Request, operations: Any) -> None:
        # Both: what lies beside a descriptor has its real name.
        self._folders = {str(request.watched.absolute()), str(request.watched.resolve())}
        self._at, self._signal, self._operations = request.signal_at, request.signal, operations
        self._numbers, self._pid = itertools.count(1), os.getpid()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Look at an event of `sys.audit`."""
        # A process that this one forked is another one, though it has the hook too.
        if not self._changes(event, arguments) or os.getpid() != self._pid:
            return
        number = next(self._numbers)
        self._operations[0] = number
        if number == self._at:
            if event == "open" and "w" in str(arguments[1]) and self._signal == signal.SIGKILL:
                os.close(os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            os.kill(self._pid, self._signal)

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event in _CHANGES:
            return any(self._holds(each, arguments) for each in arguments[:2])
        if event != "open":
            return False
        path, mode, flags = arguments
        writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & _WRITING
        return bool(writes) and self._holds(path, arguments)

    def _holds(self, path: Any, arguments: tuple[Any, ...]) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.fsdecode(path)
        if not os.path.isabs(name):  # noqa: PTH117 - as shutil.rmtree does: beside a descriptor
            folders = [n for n in arguments[1:] if isinstance(n, int) and n >= 0]
            name = os.path.join(_folder_of(folders), name)  # noqa: PTH118
        return any(f"{name}/".startswith(f"{folder}/") for folder in self._folders)


def _folder_of(descriptors: list[int]) -> str:
    for descriptor in descriptors:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        except OSError:
            continue
    return os.getcwd()  # noqa: PTH109


if __name__ == "__main__":
    _serve()
