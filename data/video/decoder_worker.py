"""The program of a decoder process, in which a hostile file cannot harm the main process.

`decoder_pool` starts the program as `python -m driving_sim.data.video.decoder_worker`. The program
reads requests from its standard input and writes answers to its standard output. It limits its own
memory. It ends when its input closes, because then its parent has ended. It protects the parent
from broken files and from bugs in the libraries that read them, but it is no sandbox: it does not
stop an attacker whose code runs in it.

Each message begins with a header, which contains the number of bytes that follow. These bytes are a
frame, an error message, or JSON followed by arrays. Nothing is pickled, because unpickling would
let a hijacked decoder run code in its parent.
"""

import json
import os
import struct
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import numpy as np

from driving_sim.data.arrays import Ints
from driving_sim.data.video.file import VideoError
from driving_sim.data.video.file_facts import VideoFacts, read_facts
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.heartbeat import listen
from driving_sim.data.video.reader import read_frames, stream_frames

MEMORY_BYTES = 4 << 30
"""Largest address space of a decoder in bytes. Decoding 8K HEVC with 10 bits was measured to take
1.5 GiB. With 16 threads it took 3.1 GiB, so `reader` uses fewer threads for large pictures."""
BEAT_S = 0.2
"""Seconds without an answer after which the decoder sends a sign of life."""
HEAD = struct.Struct("<cQ")
"""Header of a request or an answer: its kind and the number of bytes that follow."""
REQUEST = b"Q"
ANSWERS = ALIVE, CONTENT, LOST, ERROR, BROKEN = b"A", b"C", b"L", b"E", b"B"
"""Kinds of answers. ALIVE: a sign of life, also sent at the start. CONTENT: a frame or the facts.
LOST: in place of a frame that is lost to damage. ERROR: a one-line error message. BROKEN: also an
error message, but the decoder must be replaced."""


def pack(facts: VideoFacts | None = None, **values: Any) -> bytes:
    """Encode named values as bytes. They may be JSON values, tuples of them, arrays of numbers and
    video facts."""
    if facts is not None:
        values |= {name: getattr(facts, name) for name in VideoFacts.__slots__}
        values["path"] = str(facts.path)
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    head = values | {
        name: {"dtype": array.dtype.str, "count": len(array)} for name, array in arrays.items()
    }
    body = b"".join(array.tobytes() for array in arrays.values())
    return json.dumps(head).encode() + b"\n" + body


def unpack(content: bytearray) -> dict[str, Any]:
    """Decode bytes from `pack` into named values. Paths stay strings, and lists become tuples.

    Raises ValueError or TypeError for bytes that `pack` did not write.
    """
    head, _, body = content.partition(b"\n")
    values: dict[str, Any] = json.loads(head)
    start = 0
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
        elif isinstance(value, dict) and "dtype" in value:
            values[name] = np.frombuffer(body, offset=start, **value)
            start += values[name].nbytes
    return values


class _Answers:
    """Writes answers to the parent process, and ends this process if the parent has ended."""

    def __init__(self, output: BufferedWriter) -> None:
        self._output = output
        self._last = time.monotonic()

    def send(self, kind: bytes, content: bytes | memoryview = b"") -> None:
        try:
            self._output.write(HEAD.pack(kind, memoryview(content).nbytes))
            self._output.write(content)
            self._output.flush()
        except OSError:
            os._exit(0)
        self._last = time.monotonic()

    def alive(self) -> None:
        if time.monotonic() - self._last > BEAT_S:
            self.send(ALIVE)


def _contents(
    work: str, path: str, indices: Ints, size: Any = None, **facts_fields: Any
) -> Iterable[bytes | memoryview | None]:
    """Do the work of a request and return an iterable of the contents of its answers, where None
    is a lost frame."""
    if work == "facts":
        return [pack(read_facts(Path(path), **facts_fields))]
    facts = VideoFacts(path=Path(path), **facts_fields)
    if work == "stream":
        frames = stream_frames(facts, FrameSize(**size), indices)
        return (None if frame is None else frame.data for frame in frames)
    return (frame.data for frame in read_frames(facts, indices, FrameSize(**size)))


def _answer(answers: _Answers, request: dict[str, Any]) -> None:
    path = request["path"]
    try:
        if folder := request.pop("folder"):
            os.chdir(folder)
        for content in _contents(**request):
            if content is None:
                answers.send(LOST)
            else:
                answers.send(CONTENT, content)
    except VideoError as error:
        answers.send(ERROR, os.fsencode(str(error)))
    except MemoryError:
        most = f"{MEMORY_BYTES >> 30} GiB"
        text = f"decoding takes more than {most} of memory; scale the video down or leave it out"
        answers.send(BROKEN, os.fsencode(f"{path}: {text}"))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        text = f"cannot be decoded ({reason}); leave it out"
        answers.send(BROKEN, os.fsencode(f"{path}: {text}"))


def _listen(requests: "SimpleQueue[Any]", source: BinaryIO) -> None:
    """Queue the requests from the input. End this process when the parent has closed the input."""
    try:
        while True:
            _, count = HEAD.unpack(source.read(HEAD.size))
            requests.put(unpack(bytearray(source.read(count))))
    finally:
        os._exit(0)


def _limit_resources() -> None:
    if sys.platform == "win32":
        return
    import resource

    for which, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS cannot limit address space.
            _, hard = resource.getrlimit(which)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(which, (most, hard))


def main() -> None:
    """Answer requests until the parent ends."""
    _limit_resources()
    source, output = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Redirect stdout to stderr, so text that libraries print does not get between the answers.
    os.dup2(2, 1)
    requests: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests, source), daemon=True).start()
    answers = _Answers(output)
    listen(answers.alive)
    answers.send(ALIVE)
    while True:
        _answer(answers, requests.get())


if __name__ == "__main__":
    main()
