"""Videos read in processes of their own, each of which can be stopped: hostile files hang decoders.

A decoder process (`decoder`) starts when one is needed, in about 0.25 s, and is kept for the next
video; several are in use where several videos are read at once, and a process that was forked, such
as a loader's worker, starts its own. Whatever a file does to its decoder is a VideoError here: one
that gives no sign of life for DRIVESIM_DECODE_SECONDS (60 by default) is killed. Silence and
SIGKILL may be a network drive's fault or that of a full memory: then the request is made once more,
a stream from the frame that is due, and a second time is the file's fault. Nothing limits the whole
time: a file within the limits of `file` that goes on giving signs of life may take days.

A pipe bounds how far a decoder decodes ahead. `multiprocessing` would fork a process whose threads
are gone, or run a user's main module again.
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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.video import decoder_messages as messages
from driving_sim.data.video.decoder_messages import Body, Head
from driving_sim.data.video.file_facts import VideoError, VideoFacts
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.reader import frames_to_read, frames_to_stream, in_order
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.interrupt import SIGNALS

LIMIT = "DRIVESIM_DECODE_SECONDS"
"""The environment variable that says how long a decoder may give no sign of life."""
_LIMIT_S = 60.0
_START_S = 120.0
_KILL_S = 5.0
_PIPE_BYTES = 512 << 10
"""All large pipes of a user may hold 64 MiB together; beyond that new ones hold a page."""
_CLIP_BYTES = 2 << 30
"""Of a clip: the rest of a decoder's memory is for decoding it."""
_MOST_IDLE = 8

Frames = NDArray[np.uint8]
Indices = NDArray[np.int64] | Sequence[int]
_Result = TypeVar("_Result")


def read_facts(path: Path) -> VideoFacts:
    """As `file_facts.read_facts`; raises VideoError also where the file hangs or crashes it."""

    def ask() -> VideoFacts:
        with _borrowed(path) as decoder, decoder.blaming("while its facts were read"):
            decoder.ask({"do": "facts", "path": str(path)})
            head, body = decoder.answer(messages.FACTS)
            return messages.unpack_facts(head | {"path": str(path)}, body)[0]

    return _once_more(ask)


def stream_frames(
    facts: VideoFacts, size: FrameSize | None = None, indices: Indices | None = None
) -> Iterator[Frames]:
    """As `reader.stream_frames`; raises VideoError also where decoding hangs or crashes."""
    wanted = frames_to_stream(facts, indices)
    done, failed = 0, -1
    while done < len(wanted):
        try:
            with closing(_stream(facts, size, wanted[done:])) as frames:
                for frame in frames:
                    done += 1
                    yield frame
        except _StoppedError:
            if failed == done:
                raise
            failed = done


def _stream(
    facts: VideoFacts, size: FrameSize | None, wanted: NDArray[np.int64]
) -> Generator[Frames, None, None]:
    with _borrowed(facts.path) as decoder:
        head, body = messages.pack_facts(facts, wanted)
        for number, index in enumerate(wanted):
            frame = _empty(facts, size)
            reached = f"at {facts.timestamps[index]:.1f} s of {facts.timestamps[-1]:.1f} s"
            with decoder.blaming(f"{reached} (frame {index})"):
                if number == 0:
                    decoder.ask({"do": "stream", "size": _pair(size)} | head, body)
                decoder.answer(messages.FRAMES, frame, last=number == len(wanted) - 1)
            yield frame


def read_frames(facts: VideoFacts, indices: Indices, size: FrameSize | None = None) -> Frames:
    """As `reader.read_frames`; raises VideoError also where decoding hangs or crashes.

    Raises DriveSimError for a clip of more than 2 GiB.
    """
    # A decoder has no memory for a second copy of the clip: it reads increasing frames.
    wanted, positions = np.unique(frames_to_read(facts, indices), return_inverse=True)
    frames = _empty_clip(facts, size, len(wanted))
    if len(wanted) == 0:
        return frames
    clip = f"in a clip of its frames {wanted[0]}..{wanted[-1]}"
    head, body = messages.pack_facts(facts, wanted)

    def ask() -> None:
        with _borrowed(facts.path) as decoder, decoder.blaming(clip):
            decoder.ask({"do": "read", "size": _pair(size)} | head, body)
            decoder.answer(messages.FRAMES, frames)

    _once_more(ask)
    return in_order(frames, positions)


def _once_more(ask: Callable[[], _Result]) -> _Result:
    """The answer, asked for a second time where it may not be the file's fault that none came."""
    with suppress(_StoppedError):
        return ask()
    return ask()


def _pair(size: FrameSize | None) -> tuple[int, int] | None:
    return (size.height, size.width) if size else None


def _empty(facts: VideoFacts, size: FrameSize | None, *count: int) -> Frames:
    return np.empty((*count, *(_pair(size) or (facts.height, facts.width)), 3), np.uint8)


def _empty_clip(facts: VideoFacts, size: FrameSize | None, count: int) -> Frames:
    height, width = _pair(size) or (facts.height, facts.width)
    if 3 * height * width * count > _CLIP_BYTES:
        raise DriveSimError(
            f"{facts.path}: a clip of {count:,} frames of {height:,}×{width:,} takes more than "
            f"{_CLIP_BYTES >> 30} GiB; read fewer or smaller frames at once, or stream them"
        )
    return _empty(facts, size, count)


class _StoppedError(VideoError):
    """A decoder fell silent or was killed: a fault of the file's only if it happens again."""


class _Silent(Exception):  # noqa: N818
    """A decoder gave no sign of life for as long as it may."""


class _Gone(Exception):  # noqa: N818
    """A decoder ended by itself."""


class _Decoder:
    """A decoder process; one thread uses it at a time."""

    def __init__(self) -> None:
        self.path = Path()
        self.busy = True
        """Whether it is at a request: then it cannot take another."""
        self._limit_s = _START_S
        with _signals_blocked():
            self._process = subprocess.Popen(
                # -P: a script's folder and the current one are not searched by themselves.
                [sys.executable, "-P", "-m", "driving_sim.data.video.decoder_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=_environment(),
            )
            pipes: tuple[Any, Any] = self._process.stdin, self._process.stdout
            self._input, self._output = pipes
            _started.add(self)
        self._await_start()

    def _await_start(self) -> None:
        what = "the process that decodes videos does not start"
        try:
            if hasattr(select, "poll"):  # Windows waits without a limit
                self._writable = _poll(self._input.fileno(), select.POLLOUT)
                self._readable = _poll(self._output.fileno(), select.POLLIN)
            _enlarge(self._output.fileno())
            self.answer(messages.READY)
        except (_Silent, _Gone):
            self.end()
            raise OSError(errno.EIO, what, sys.executable) from None
        except (ValueError, KeyError, TypeError):
            self.end()
            what += ": something prints as Python starts (sitecustomize.py or a .pth file?)"
            raise OSError(errno.EIO, what, sys.executable) from None
        except BaseException:  # Ctrl-C
            self.end()
            raise

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @contextmanager
    def blaming(self, where: str) -> Iterator[None]:
        """Turn what happens to the decoder inside into a VideoError of its file."""
        try:
            yield
        except _Silent:
            raise _StoppedError(
                f"{self.path}: its decoder gave no sign of life for {self._limit_s:g} s {where}, "
                f"twice, and was stopped; leave the file out, or set {LIMIT} to wait longer"
            ) from None
        except _Gone:
            cause = self._cause()
            kind, often = (_StoppedError, ", twice") if cause == "SIGKILL" else (VideoError, "")
            raise kind(
                f"{self.path}: its decoder died ({cause}) {where}{often}: the file is damaged or "
                "hostile, or memory ran out; leave it out"
            ) from None
        except (ValueError, KeyError, TypeError):
            self.busy = True
            raise VideoError(
                f"{self.path}: its decoder answered nonsense {where}: the file is damaged or "
                "hostile; leave it out"
            ) from None

    def ask(self, head: Head, body: bytes = b"") -> None:
        """Send a request about a file."""
        self.busy = True
        self._limit_s = _limit_s()
        if not self.path.is_absolute():  # the decoder may have started in another folder
            head |= {"folder": str(Path.cwd())}
        self._put(messages.start(messages.REQUEST, head, len(body)))
        self._put(body)

    def answer(
        self, kind: bytes, into: Frames | None = None, *, last: bool = True
    ) -> tuple[Head, Body]:
        """The next message, which must be of this kind and fit; raises VideoError for an error."""
        got, head, body = messages.ALIVE, Head(), np.empty(0, np.uint8)
        while got == messages.ALIVE:
            got, head, body = messages.receive(self._fill, into)
        if got == messages.ERROR:
            self.busy = "broken" in head
            raise VideoError(head["text"])
        if got != kind or (into is not None and body is not into):
            raise ValueError(f"not what was asked for: {got!r}")
        self.busy = not last
        return head, body

    def _put(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            try:
                count = self._input.write(left)
            except OSError:
                raise _Gone from None
            if count is None:
                self._wait(self._writable)
            else:
                left = left[count:]

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            count = self._output.readinto(buffer)
            if count == 0:
                raise _Gone
            if count is None:
                self._wait(self._readable)
            else:
                buffer = buffer[count:]

    def _wait(self, ready: "select.poll") -> None:
        # In slices: after a pause (Ctrl-Z) no more than one of them is over.
        slices = math.ceil(self._limit_s)
        if not any(ready.poll(1000 * self._limit_s / slices) for _ in range(slices)):
            raise _Silent

    def _cause(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_KILL_S)
        code = self._process.returncode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def end(self) -> None:
        """Kill it. One that waits for a disk that is gone cannot be, and is left alone."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_KILL_S)
        self._close()

    def disown(self) -> None:
        """Forget it in a forked process: its parent uses it, and waits for its end."""
        self._process.returncode = 0
        self._close()

    def _close(self) -> None:
        for pipe in (self._input, self._output):
            with suppress(OSError):
                pipe.close()
        _started.discard(self)


_started: set[_Decoder] = set()
_idle: deque[_Decoder] = deque()
"""Both are changed by operations that other threads and the garbage collector cannot split."""


@contextmanager
def _borrowed(path: Path) -> Iterator[_Decoder]:
    """A decoder for a file. It is kept unless it is left in the middle of a request."""
    decoder = _idle_one() or _Decoder()
    decoder.path = path
    try:
        yield decoder
    finally:
        if decoder.busy or len(_idle) >= _MOST_IDLE:
            decoder.end()
        else:
            _idle.append(decoder)


def _idle_one() -> _Decoder | None:
    with suppress(IndexError):
        while True:
            decoder = _idle.pop()
            if decoder.is_alive:
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
    return os.environ | {
        "PYTHONPATH": found,
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that start inside never see Ctrl-C or SIGTERM: their parent decides."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _poll(pipe: int, event: int) -> "select.poll":
    os.set_blocking(pipe, False)
    poll = select.poll()
    poll.register(pipe, event)
    return poll


def _enlarge(pipe: int) -> None:
    """Let frames pass with fewer waits; a user may have a number of large pipes only."""
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _end_all() -> None:
    for decoder in list(_started):
        decoder.end()


def _disown_all() -> None:
    for decoder in list(_started):
        decoder.disown()
    _idle.clear()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
