"""Run `drivesim` commands in processes that start within milliseconds and can be killed.

`python -m tests.stress.chaos_worker` imports everything once and then forks a process for each
request. A request is a line of JSON on stdin (see `Request`). The answer is two lines on stdout.
The first has the process id and is printed when the process has started. The second says how the
process ended.
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
"""Seconds after which a process that has not ended counts as hanging."""
SHARD_BYTES = 1500
"""Size of a shard in bytes. It is so small that a run writes several shards of toy drives."""

# The audit events of file operations. shutil raises these events too, and `os.replace` raises
# `os.rename`.
_CHANGES = frozenset(
    ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
)
_HIDDEN = ("torch._dynamo", "typer._adapters")
"""Modules that the first optimiser (2 s) and the first typer call would otherwise import."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A command to run, and how to disturb it."""

    command: tuple[str, ...]
    """Arguments of `drivesim`."""
    log: Path
    """File for the output of the process."""
    watched: Path
    """Folder whose file operations are counted."""
    signal_at: int = 0
    """Number of the operation on the watched folder at which the signal is sent; 0 means never."""
    after: float | None = None
    """Seconds after which the signal is sent if the process still runs; None means never."""
    signal: int = signal.SIGKILL
    """Signal to send."""
    file_limit: int | None = None
    """Maximum size of a file in bytes, to imitate a full disk."""

    def to_json(self) -> bytes:
        """Return the request as one line of JSON."""
        return json.dumps(asdict(self), default=str).encode() + b"\n"

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Return the request in a line that `to_json` wrote."""
        values: dict[str, Any] = json.loads(line)
        values |= {name: Path(values[name]) for name in ("log", "watched")}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    status: int
    """Exit code, or minus the number of the signal that ended the process."""
    operations: int
    """Number of operations on the watched folder, including the one at which a signal was sent."""
    seconds: float
    """Seconds from start to end."""


class Server:
    """Client that starts a `chaos_worker` process and sends it requests, until the context ends.

    `prefix` is put in front of the command line of that process.
    """

    def __init__(self, *prefix: str) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.stress.chaos_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            # OpenMP may hang in a fork if the parent process has started threads.
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            bufsize=0,  # `select` would miss an answer that is already in a buffer
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
        """Process id of the forking process."""
        return self._process.pid

    def run(self, request: Request) -> Ended:
        """Run the request and return how its process ended. Raises TimeoutError if it hangs."""
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
            raise RuntimeError("the forking process ended; see its output above")
        answer: dict[str, int] = json.loads(line)
        return answer


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # the process may have just ended by itself
        os.kill(pid, number)


def _serve() -> None:
    """Fork a process for each request on stdin, and print its id and how it ended."""
    app = _import_all()
    operations = memoryview(mmap.mmap(-1, 8)).cast("q")  # memory shared with the forks
    # Freeze the imported objects. Otherwise the garbage collector of each fork would write to their
    # memory pages, which copies the pages.
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
    """Import everything that the commands import, without starting a thread. Return the app."""
    from driving_sim import pipeline
    from driving_sim.cli import app
    from driving_sim.tokenizer.tokenize import tokenize

    for hidden in _HIDDEN:
        with suppress(ImportError):
            import_module(hidden)
    vars(pipeline)["tokenize"] = partial(tokenize, shard_bytes=SHARD_BYTES)
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, (
        "importing started a thread, which a fork does not copy"
    )
    return app


def _become(app: Callable[[list[str]], None], request: Request, operations: Any) -> NoReturn:
    """Run the command of the request in the forked process, and exit with its exit code."""
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
    # Skip Python's clean-up at exit, which with torch takes longer than the run.
    os._exit(status)


class Watch:
    """Audit hook that counts operations that change a folder, and sends a signal at one of them.

    Python calls the hook before the operation, so a killed process never performs it. But if the
    operation opens a file for writing, the hook truncates the file before it sends SIGKILL, as if
    the kill came just after the opening.
    """

    def __init__(self, request: Request, operations: Any) -> None:
        # Compare with both names of the folder: paths relative to a descriptor contain its real
        # name.
        self._folders = {str(request.watched.absolute()), str(request.watched.resolve())}
        self._at, self._signal, self._operations = request.signal_at, request.signal, operations
        self._numbers, self._pid = itertools.count(1), os.getpid()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Handle an event of `sys.audit`."""
        # Processes that this process forks inherit the hook, but their operations do not count.
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
            return any(self._holds(path, arguments) for path in arguments[:2])
        if event != "open":
            return False
        path, mode, flags = arguments
        writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & _WRITING
        return bool(writes) and self._holds(path, arguments)

    def _holds(self, path: Any, arguments: tuple[Any, ...]) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.fsdecode(path)
        if not os.path.isabs(name):  # noqa: PTH117 - relative to a descriptor, as in shutil.rmtree
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
