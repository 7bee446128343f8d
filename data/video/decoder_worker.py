"""What runs in a decoder process: it opens the videos, and what they do to a decoder stays there.

It takes requests from its standard input and writes messages to its output (`decoder_messages`),
within limits of its own, and ends with its parent: when its input closes. `decoder_pool` starts it
as `python -m driving_sim.data.video.decoder_worker`. It holds faults of files and of the libraries
that read them; it is no sandbox against code that got to run in it.
"""

import os
import threading
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.video import decoder_messages as messages
from driving_sim.data.video.decoder_messages import Body, Head
from driving_sim.data.video.file_facts import VideoError, read_facts
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.heartbeat import listen
from driving_sim.data.video.reader import read_frames, stream_frames

MEMORY_BYTES = 4 << 30
"""Address space of a decoder. 8K HEVC of 10 bits was measured to take 1.5 GiB of it, and 3.1 GiB
with 16 threads, of which `reader` starts fewer for large pictures."""
BEAT_S = 0.2
"""Time between signs of life while nothing else is sent."""


class _Answers:
    """Writes messages; a parent that is gone ends the process."""

    def __init__(self, output: int) -> None:
        self._output = output
        self._last = time.monotonic()

    def send(self, kind: bytes, head: Head | None = None, body: bytes | memoryview = b"") -> None:
        start = messages.start(kind, head, len(body))
        try:
            # In one piece where it can be: every piece wakes the parent.
            written = os.writev(self._output, [start, body]) if hasattr(os, "writev") else 0
            for part in (start[written:], memoryview(body)[max(0, written - len(start)) :]):
                self._write(part)
        except OSError:
            os._exit(0)
        self._last = time.monotonic()

    def _write(self, part: bytes | memoryview) -> None:
        while part:
            part = part[os.write(self._output, part) :]

    def send_frames(self, frames: NDArray[np.uint8]) -> None:
        self.send(messages.FRAMES, body=frames.reshape(-1).data)

    def alive(self) -> None:
        if time.monotonic() - self._last > BEAT_S:
            self.send(messages.ALIVE)


def _facts(answers: _Answers, head: Head, body: Body) -> None:
    answers.send(messages.FACTS, *messages.pack_facts(read_facts(Path(head["path"]))))


def _stream(answers: _Answers, head: Head, body: Body) -> None:
    size = _size(head)
    facts, indices = messages.unpack_facts(head, body)
    for frame in stream_frames(facts, size, indices):
        answers.send_frames(frame)


def _read(answers: _Answers, head: Head, body: Body) -> None:
    size = _size(head)
    facts, indices = messages.unpack_facts(head, body)
    answers.send_frames(read_frames(facts, indices, size))


def _size(head: Head) -> FrameSize | None:
    size = head.pop("size")
    return FrameSize(height=size[0], width=size[1]) if size else None


_TASKS: dict[str, Callable[[_Answers, Head, Body], None]] = {
    "facts": _facts,
    "stream": _stream,
    "read": _read,
}


def _answer(answers: _Answers, head: Head, body: Body) -> None:
    path = head["path"]
    try:
        if folder := head.pop("folder", None):
            os.chdir(folder)
        _TASKS[head.pop("do")](answers, head, body)
    except VideoError as error:
        answers.send(messages.ERROR, {"text": str(error)})
    except MemoryError:
        most = f"{MEMORY_BYTES >> 30} GiB"
        text = f"decoding it takes more memory than {most}; scale it down or leave it out"
        answers.send(messages.ERROR, {"text": f"{path}: {text}", "broken": True})
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        text = f"cannot be decoded ({reason}); leave it out"
        answers.send(messages.ERROR, {"text": f"{path}: {text}", "broken": True})


def _listen(requests: "SimpleQueue[tuple[Head, Body]]", source: BufferedReader) -> None:
    """Pass requests on until the input closes: then the parent is gone, whatever runs here."""

    def fill(buffer: memoryview) -> None:
        if source.readinto(buffer) < len(buffer):
            os._exit(0)

    try:
        while True:
            _, head, body = messages.receive(fill)
            requests.put((head, body))
    finally:
        os._exit(1)


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for which, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        try:
            _, hard = resource.getrlimit(which)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(which, (most, hard))
        except (ValueError, OSError):  # macOS takes no limit on address space
            continue


def main() -> None:
    """Answer requests until the parent is gone."""
    _limit_resources()
    source = os.fdopen(os.dup(0), "rb")
    answers = _Answers(os.dup(1))
    os.dup2(2, 1)  # what a library prints must not get between the messages
    requests: SimpleQueue[tuple[Head, Body]] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests, source), daemon=True).start()
    listen(answers.alive)
    answers.send(messages.READY)
    while True:
        _answer(answers, *requests.get())


if __name__ == "__main__":
    main()
