"""Read videos in decoder processes, so a hostile file can hang or crash only its decoder.

A decoder process (`decoder_worker`) is started when it is needed, which takes about 0.25 s, and is
kept for the next video. If several videos are read at the same time, each has its own decoder. A
forked process, such as a worker of a data loader, starts its own decoders.

If a file crashes or hangs its decoder, that becomes a VideoError. A decoder that gives no sign of
life for DRIVESIM_DECODE_SECONDS (60 by default) is killed. But a decoder can also be silent because
a network drive stalls, or be killed with SIGKILL because memory is full. So the request is repeated
from the first missing frame, and the file is blamed only if it fails twice at the same frame. There
is no limit on the total time: a file within the limits of the module `file` may take days, as long
as its decoder keeps giving signs of life.

A decoder works ahead of its reader only until the pipe between them is full.

`multiprocessing` and its pools are not used for three reasons. They either fork, which is unsafe in
a process with threads, or import the user's main module again. They cannot start processes in the
worker of a data loader. And they unpickle the data that their workers send.
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
"""Environment variable: the seconds without a sign of life after which a decoder is killed."""
_LIMIT_S = 60.0
_START_S = 120.0
_KILL_S = 5.0
_PIPE_BYTES = 512 << 10
"""Size in bytes of the pipe from a decoder. It is not larger, because by default Linux allows each
user 64 MiB of pipes. Beyond that limit, new pipes have room for only one page."""
_CLIP_BYTES = 2 << 30
"""Largest clip in bytes. A decoder needs the rest of its memory for decoding."""
_MOST_BYTES = 1 << 30
"""Largest answer in bytes, unless the answer is a frame."""
_MOST_IDLE = 8
_WINDOWS = sys.platform == "win32"


def read_facts(
    path: Path, *, stream: int | None = None, video_fps: float | None = None
) -> VideoFacts:
    """Read the facts of a video as `file_facts.read_facts` does, but in a decoder process.

    Also raises VideoError if the file hangs or crashes the decoder.
    """
    where = "while its facts were read"
    request = {"work": "facts", "stream": stream, "video_fps": video_fps}
    facts: VideoFacts
    (facts,) = _answers(path, np.zeros(1, int), lambda _: None, lambda _: where, **request)
    return facts


def stream_frames(
    facts: VideoFacts, size: FrameSize | None = None, indices: Indices | None = None
) -> Iterator[Pixels | None]:
    """Yield frames as `reader.stream_frames` does, but decode them in a decoder process.

    Also raises VideoError if the file hangs or crashes the decoder.
    """
    numbers, times = frames_to_stream(facts, indices), facts.timestamps
    shape = (*_size(facts, size).values(), 3)

    def where(done: int) -> str:
        return f"at {times[numbers[done]]:.1f} s of {times[-1]:.1f} s (frame {numbers[done]})"

    request = {"work": "stream", "facts": facts, "size": _size(facts, size)}
    return _answers(facts.path, numbers, lambda _: np.empty(shape, np.uint8), where, **request)


def read_frames(facts: VideoFacts, indices: Indices, size: FrameSize | None = None) -> Pixels:
    """Read a clip as `reader.read_frames` does, but in a decoder process.

    Returns one array [n, height, width, 3]. Also raises VideoError if the file hangs or crashes the
    decoder, and DriveSimError if the clip needs more than 2 GiB.
    """
    numbers = frames_to_read(facts, indices)
    height, width = _size(facts, size).values()
    if 3 * height * width * len(numbers) > _CLIP_BYTES:
        raise DriveSimError(
            f"{facts.path}: a clip of {len(numbers):,} frames of {height:,}×{width:,} takes more "
            f"than {_CLIP_BYTES >> 30} GiB; read fewer or smaller frames at once, or stream them"
        )
    frames = np.empty((len(numbers), height, width, 3), np.uint8)

    def where(_: int) -> str:
        return f"in a clip of its frames {numbers.min()}..{numbers.max()}"

    request = {"work": "read", "facts": facts, "size": _size(facts, size)}
    deque(_answers(facts.path, numbers, frames.__getitem__, where, **request), maxlen=0)
    return frames


def _size(facts: VideoFacts, size: FrameSize | None) -> dict[str, int]:
    return asdict(size or FrameSize(height=facts.height, width=facts.width))


def _answers(
    path: Path,
    numbers: Ints,
    slot: Callable[[int], Pixels | None],
    where: Callable[[int], str],
    **request: Any,
) -> Iterator[Any]:
    """Send a request about a file to a decoder and yield its answers, one for each of `numbers`.

    `slot(n)` returns the array to read answer n into, or None if the answer is not a frame.
    `where(n)` says in an error message at which point of the file answer n failed.
    """
    done, failed = 0, -1
    while done < len(numbers):
        decoder = _idle_one() or _Decoder()
        try:
            decoder.ask(path, indices=numbers[done:], **request)
            while done < len(numbers):
                answer = decoder.answer(slot(done))
                done += 1
                decoder.busy = done < len(numbers)
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
    """A decoder process. Only one thread may use it at a time."""

    def __init__(self) -> None:
        self.busy = False
        """Whether the decoder is working on a request. If so, it cannot take another request."""
        self._path, self._limit_s = Path(), 0.0
        self._has_started = False
        if not _WINDOWS:
            # The decoder inherits this mask and so ignores Ctrl-C and SIGTERM: its parent ends it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process = subprocess.Popen(
                # -P keeps Python from searching the current folder for modules.
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
            if sys.platform == "linux":
                import fcntl

                # With a larger pipe, both processes wait less. Linux refuses to enlarge the pipe if
                # the pipes of this user are too large in total.
                with suppress(OSError):
                    fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        finally:
            if not _WINDOWS:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ask(self, path: Path, **request: Any) -> None:
        """Send a request about a file to the process."""
        self.busy, self._path, self._limit_s = True, path, _limit_s()
        # Relative paths are relative to the current folder of this process, not of the decoder.
        folder = None if path.is_absolute() else str(Path.cwd())
        content = worker.pack(path=str(path), folder=folder, **request)
        left = memoryview(worker.HEAD.pack(worker.REQUEST, len(content)) + content)
        while left:
            self._wait(self._input)
            left = left[self._input.write(left) or 0 :]

    def answer(self, slot: Pixels | None) -> Pixels | VideoFacts | None:
        """Wait for the next answer: a frame, read into `slot`, or the facts of a video. A frame
        that is lost to damage is None.

        Raises VideoError if the decoder reports an error.
        """
        kind, count = worker.ALIVE, 0
        while kind == worker.ALIVE:
            kind, count = worker.HEAD.unpack(self._fill(bytearray(worker.HEAD.size)))
            if kind not in worker.ANSWERS:
                raise ValueError(f"unknown kind of answer: {kind!r}")
            self._has_started = True
        if kind == worker.LOST and slot is not None and count == 0:
            return None
        in_place = kind == worker.CONTENT and slot is not None
        content: Any = slot if in_place else bytearray(min(count, _MOST_BYTES))
        if memoryview(content).nbytes != count:
            raise ValueError(f"an answer of {count:,} bytes does not have the expected size")
        self._fill(content)
        if kind == worker.CONTENT:
            facts = None if in_place else worker.unpack(content)
            return content if facts is None else VideoFacts(**facts | {"path": self._path})
        if kind == worker.LOST:
            raise ValueError("nothing that could be lost was asked for")
        self.busy = kind == worker.BROKEN
        raise VideoError(os.fsdecode(bytes(content)))

    def fault(self, error: Exception) -> tuple[str, str, bool]:
        """Explain an error: return what happened, what to do, and whether a retry may help.

        Raises OSError if the decoder never started.
        """
        is_gone = isinstance(error, (EOFError, BrokenPipeError))
        if not self._has_started:
            what = "the process that decodes videos does not start"
            if not is_gone and not isinstance(error, TimeoutError):
                what += ": something prints while Python starts (sitecustomize.py or a .pth file?)"
            raise OSError(errno.EIO, what, sys.executable) from None
        if isinstance(error, TimeoutError):
            remedy = f", and was stopped; leave the file out, or set {LIMIT} to wait longer"
            return f"gave no sign of life for {self._limit_s:g} s", remedy, True
        if not is_gone:
            return "sent an invalid answer", ": the file is damaged or hostile; leave it out", False
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
        if _WINDOWS:  # Windows cannot poll pipes, so reads there have no time limit.
            return
        ready = select.poll()
        ready.register(pipe)
        # Wait in slices of about a second. The time for which the user suspends this process
        # (Ctrl-Z) then counts as one slice at most.
        limit_s = self._limit_s if self._has_started else _START_S
        slices = math.ceil(limit_s)
        if not any(ready.poll(1000 * limit_s / slices) for _ in range(slices)):
            raise TimeoutError

    def end(self) -> None:
        """Kill the process, and wait at most 5 s until it has ended.

        A process cannot end while it waits for a network drive that does not answer.
        """
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_KILL_S)
        for pipe in (self._input, self._output):
            with suppress(OSError):
                pipe.close()
        _started.discard(self)


# Change these collections only by atomic operations: other threads and the garbage collector may
# change them at the same time.
_started: set[_Decoder] = set()
_idle: deque[_Decoder] = deque()


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
    """Return the environment variables for a decoder, so it imports the same modules as here."""
    module_path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    # Use few malloc arenas: the address space is limited, and each arena reserves 64 MiB of it.
    threads = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    return os.environ | threads | {"PYTHONPATH": module_path}


def end_all() -> None:
    """End all decoders of this process. The next request starts a new decoder."""
    for decoder in list(_started):
        decoder.end()


def _disown_all() -> None:
    """Forget all decoders. A forked process calls this, because they belong to its parent."""
    for decoder in list(_started):
        # `end` must close this process's copies of the pipes, but must not kill the decoder, which
        # the parent still uses. So set a return code, as if the decoder had already ended.
        decoder.process.returncode = 0
        decoder.end()
    _idle.clear()


atexit.register(end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
