"""Videos read in processes of their own, each of which can be stopped: hostile files hang decoders.

A decoder process (`decoder_worker`) starts when one is needed, in about 0.25 s, and is kept for the
next video; several are in use where several videos are read at once, and a process that was forked,
such as a loader's worker, starts its own. Whatever a file does to its decoder is a VideoError here:
one that gives no sign of life for DRIVESIM_DECODE_SECONDS (60 by default) is killed. Silence and
SIGKILL may be a network drive's fault or that of a full memory: then the request is made once more,
from the frame that is due, and a second time is the file's fault. Nothing limits the whole time: a
file within the limits of `file` that goes on giving signs of life may take days.

A pipe bounds how far a decoder decodes ahead. `multiprocessing` would fork a process whose threads
are gone, or run a user's main module again; it starts none in a loader's worker, and so do pools
made of it, which besides unpickle what their workers send.
"""

import atexit
import errno
import math
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from driving_sim.data.arrays import Ints, Pixels
from driving_sim.data.video import decoder_worker as worker
from driving_sim.data.video.file import VideoError
from driving_sim.data.video.file_facts import VideoFacts
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.reader import Indices, frames_to_read, frames_to_stream
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.training.interrupt import SIGNALS

LIMIT = "DRIVESIM_DECODE_SECONDS"
"""The environment variable that says how long a decoder may give no sign of life."""
_LIMIT_S = 60.0
_START_S = 120.0
_KILL_S = 5.0
_PIPE_BYTES = 512 << 10
"""All large pipes of a user may hold 64 MiB together; beyond that new ones hold a page."""
_CLIP_BYTES = 2 << 30
"""Of a clip: the rest of a decoder's memory is for decoding it."""
_MOST_BYTES = 1 << 30
"""Of an answer that does not say how long it will be."""
_MOST_IDLE = 8
_WINDOWS = sys.platform == "win32"


def read_facts(path: Path) -> VideoFacts:
    """As `file_facts.read_facts`; raises VideoError also where the file hangs or crashes it."""
    where = "while its facts were read"
    facts: VideoFacts
    (facts,) = _answers(path, np.zeros(1, int), lambda _: None, lambda _: where, work="facts")
    return facts


def stream_frames(
    facts: VideoFacts, size: FrameSize | None = None, indices: Indices | None = None
) -> Iterator[Pixels]:
    """As `reader.stream_frames`; raises VideoError also where decoding hangs or crashes."""
    wanted, times = frames_to_stream(facts, indices), facts.timestamps
    shape = (*_size(facts, size).values(), 3)

    def where(done: int) -> str:
        return f"at {times[wanted[done]]:.1f} s of {times[-1]:.1f} s (frame {wanted[done]})"

    request = {"work": "stream", "facts": facts, "size": _size(facts, size)}
    return _answers(facts.path, wanted, lambda _: np.empty(shape, np.uint8), where, **request)


def read_frames(facts: VideoFacts, indices: Indices, size: FrameSize | None = None) -> Pixels:
    """As `reader.read_frames`, in one array [n, height, width, 3].

    Raises VideoError also where decoding hangs or crashes, DriveSimError for a clip of more than
    2 GiB.
    """
    wanted = frames_to_read(facts, indices)
    height, width = _size(facts, size).values()
    if 3 * height * width * len(wanted) > _CLIP_BYTES:
        raise DriveSimError(
            f"{facts.path}: a clip of {len(wanted):,} frames of {height:,}×{width:,} takes more "
            f"than {_CLIP_BYTES >> 30} GiB; read fewer or smaller frames at once, or stream them"
        )
    frames = np.empty((len(wanted), height, width, 3), np.uint8)

    def where(_: int) -> str:
        return f"in a clip of its frames {wanted.min()}..{wanted.max()}"

    request = {"work": "read", "facts": facts, "size": _size(facts, size)}
    deque(_answers(facts.path, wanted, frames.__getitem__, where, **request), maxlen=0)
    return frames


def _size(facts: VideoFacts, size: FrameSize | None) -> dict[str, int]:
    return asdict(size or FrameSize(height=facts.height, width=facts.width))


def _answers(
    path: Path,
    wanted: Ints,
    slot: Callable[[int], Pixels | None],
    where: Callable[[int], str],
    **request: Any,
) -> Iterator[Any]:
    """Yield a decoder's answers to a request about a file, as many as are `wanted`.

    From the number of answers that are there already, `slot` gives what the next one goes into, and
    `where` says how far the file was read.
    """
    done, failed = 0, -1
    while done < len(wanted):
        decoder = _idle_one() or _Decoder()
        try:
            decoder.ask(path, indices=wanted[done:], **request)
            while done < len(wanted):
                answer = decoder.answer(slot(done))
                done += 1
                decoder.busy = done < len(wanted)
                yield answer
        except (DriveSimError, MemoryError):
            raise
        except Exception as error:
            what, remedy, may_pass = decoder.fault(error)
            if failed == done or not may_pass:
                often = ", twice" if may_pass else ""
                text = f"{path}: its decoder {what} {where(done)}{often}{remedy}"
                raise VideoError(text) from None
            failed = done
        finally:
            if decoder.busy or len(_idle) >= _MOST_IDLE:
                decoder.end()
            else:
                _idle.append(decoder)


class _Decoder:
    """A decoder process; one thread uses it at a time."""

    def __init__(self) -> None:
        self.busy = False
        """Whether it is at a request: then it cannot take another."""
        self._path, self._limit_s = Path(), 0.0
        self._has_started = False
        if not _WINDOWS:  # it never sees Ctrl-C or SIGTERM: its parent decides
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process = subprocess.Popen(
                # -P: a script's folder and the current one are not searched by themselves.
                [sys.executable, "-P", "-m", "driving_sim.data.video.decoder_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=_environment(),
            )
            pipes: tuple[Any, Any] = self.process.stdin, self.process.stdout
            self._input, self._output = pipes
            _started.add(self)
            if not _WINDOWS:
                os.set_blocking(self._input.fileno(), False)
            if sys.platform == "linux":  # frames pass with fewer waits
                import fcntl

                with suppress(OSError):  # a user may have a number of large pipes only
                    fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        finally:
            if not _WINDOWS:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ask(self, path: Path, **request: Any) -> None:
        """Send a request about a file."""
        self.busy, self._path, self._limit_s = True, path, _limit_s()
        # It may have started in another folder.
        folder = None if path.is_absolute() else str(Path.cwd())
        content = worker.pack(path=str(path), folder=folder, **request)
        left = memoryview(worker.HEAD.pack(worker.REQUEST, len(content)) + content)
        while left:
            self._wait(self._input)
            left = left[self._input.write(left) or 0 :]

    def answer(self, slot: Pixels | None) -> Pixels | VideoFacts:
        """The next answer: frames in their slot, or facts; raises VideoError for an error."""
        kind, count = worker.ALIVE, 0
        while kind == worker.ALIVE:
            kind, count = worker.HEAD.unpack(self._fill(bytearray(worker.HEAD.size)))
            if kind not in worker.ANSWERS:
                raise ValueError(f"not an answer: {kind!r}")
            self._has_started = True
        in_place = kind == worker.CONTENT and slot is not None
        content: Any = slot if in_place else bytearray(min(count, _MOST_BYTES))
        if memoryview(content).nbytes != count:
            raise ValueError(f"{count:,} bytes")
        self._fill(content)
        if kind == worker.CONTENT:
            facts = None if in_place else worker.unpack(content)
            return content if facts is None else VideoFacts(**facts | {"path": self._path})
        self.busy = kind == worker.BROKEN
        raise VideoError(os.fsdecode(bytes(content)))

    def fault(self, error: Exception) -> tuple[str, str, bool]:
        """What an error at a request means, what to do, and whether it may pass by itself.

        Raises OSError where the decoder did not even start.
        """
        is_gone = isinstance(error, (EOFError, BrokenPipeError))
        if not self._has_started:
            what = "the process that decodes videos does not start"
            if not is_gone and not isinstance(error, TimeoutError):
                what += ": something prints as Python starts (sitecustomize.py or a .pth file?)"
            raise OSError(errno.EIO, what, sys.executable) from None
        if isinstance(error, TimeoutError):
            remedy = f", and was stopped; leave the file out, or set {LIMIT} to wait longer"
            return f"gave no sign of life for {self._limit_s:g} s", remedy, True
        if not is_gone:
            return "answered nonsense", ": the file is damaged or hostile; leave it out", False
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_KILL_S)
        code = self.process.returncode or 0
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        remedy = ": the file is damaged or hostile, or memory ran out; leave it out"
        return f"died ({cause})", remedy, cause == "SIGKILL"

    def _fill(self, buffer: Any) -> Any:
        left = memoryview(buffer).cast("B")
        while left:
            self._wait(self._output)
            count = self._output.readinto(left)
            if not count:
                raise EOFError
            left = left[count:]
        return buffer

    def _wait(self, pipe: Any) -> None:
        if _WINDOWS:  # it waits without a limit
            return
        ready = select.poll()
        ready.register(pipe)
        # In slices: after a pause (Ctrl-Z) no more than one of them is over.
        limit_s = self._limit_s if self._has_started else _START_S
        slices = math.ceil(limit_s)
        if not any(ready.poll(1000 * limit_s / slices) for _ in range(slices)):
            raise TimeoutError

    def end(self) -> None:
        """Kill it. One that waits for a disk that is gone cannot be, and is left alone."""
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_KILL_S)
        for pipe in (self._input, self._output):
            with suppress(OSError):
                pipe.close()
        _started.discard(self)


_started: set[_Decoder] = set()
_idle: deque[_Decoder] = deque()
"""Both are changed by operations that other threads and the garbage collector cannot split."""


def _idle_one() -> _Decoder | None:
    with suppress(IndexError):
        while True:
            decoder = _idle.pop()
            if decoder.process.poll() is None:
                return decoder
            decoder.end()
    return None


def _limit_s() -> float:
    text = os.environ.get(LIMIT) or str(_LIMIT_S)
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise DriveSimError(f"{LIMIT}={text}: must be a number of seconds above 0")


def _environment() -> dict[str, str]:
    """Ours, and where this process finds its modules: an import there finds the same."""
    found = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    # Every arena of malloc, one a thread, would take 64 MiB or more of the address space.
    threads = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    return os.environ | threads | {"PYTHONPATH": found}


def end_all() -> None:
    """End all decoders of this process; the next request starts one."""
    for decoder in list(_started):
        decoder.end()


def _disown_all() -> None:
    """Forget them in a forked process: its parent uses them, and waits for their end."""
    for decoder in list(_started):
        decoder.process.returncode = 0
        decoder.end()
    _idle.clear()


atexit.register(end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
