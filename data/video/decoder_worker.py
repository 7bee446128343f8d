"""What runs in a decoder process: it opens the videos, and what they do to a decoder stays there.

It takes requests from its standard input and answers on its output, within limits of its own, and
ends with its parent: when its input closes. `decoder_pool` starts it as
`python -m driving_sim.data.video.decoder_worker`. It holds faults of files and of the libraries
that read them; it is no sandbox against code that got to run in it.

Both say how many bytes follow, then JSON and arrays' bytes, or a frame. Nothing is pickled: this
side handles hostile files, and the other must not run what it sends.
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
"""Address space of a decoder. 8K HEVC of 10 bits was measured to take 1.5 GiB of it, and 3.1 GiB
with 16 threads, of which `reader` starts fewer for large pictures."""
BEAT_S = 0.2
"""Time between signs of life while nothing else is sent."""
HEAD = struct.Struct("<cQ")
"""Of a request or an answer: its kind, and how many bytes follow."""
REQUEST = b"Q"
ANSWERS = ALIVE, CONTENT, ERROR, BROKEN = b"A", b"C", b"E", b"B"
"""An answer is a sign of life, the first one as a decoder starts; a part of what was asked for; one
line that says why it does not come; the same from a decoder that is not fit for another request."""


def pack(facts: VideoFacts | None = None, **others: Any) -> bytes:
    """A video's facts and other values by name: what JSON can hold, and arrays of numbers."""
    if facts is not None:
        others |= {name: getattr(facts, name) for name in VideoFacts.__slots__}
        others["path"] = str(facts.path)
    arrays = {name: each for name, each in others.items() if isinstance(each, np.ndarray)}
    head = others | {name: [each.dtype.str, len(each)] for name, each in arrays.items()}
    return json.dumps(head).encode() + b"\n" + b"".join(each.tobytes() for each in arrays.values())


def unpack(content: bytearray) -> dict[str, Any]:
    """What `pack` was given, paths as texts; raises ValueError or TypeError for anything else."""
    head, _, body = content.partition(b"\n")
    values: dict[str, Any] = json.loads(head)
    start = 0
    for name, value in values.items():
        if isinstance(value, list):
            dtype, count = value
            values[name] = np.frombuffer(body, dtype, count, start)
            start += values[name].nbytes
    return values


class _Answers:
    """Writes answers; a parent that is gone ends the process."""

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
    work: str, path: str, indices: Ints, size: Any = None, **given: Any
) -> Iterable[bytes | memoryview]:
    """What was asked for, answer by answer."""
    if work == "facts":
        return [pack(read_facts(Path(path)))]
    facts = VideoFacts(path=Path(path), **given)
    if work == "stream":
        return (frame.data for frame in stream_frames(facts, FrameSize(**size), indices))
    return (frame.data for frame in read_frames(facts, indices, FrameSize(**size)))


def _answer(answers: _Answers, request: dict[str, Any]) -> None:
    path = request["path"]
    try:
        if folder := request.pop("folder"):
            os.chdir(folder)
        for content in _contents(**request):
            answers.send(CONTENT, content)
    except VideoError as error:
        answers.send(ERROR, os.fsencode(str(error)))
    except MemoryError:
        most = f"{MEMORY_BYTES >> 30} GiB"
        text = f"decoding it takes more memory than {most}; scale it down or leave it out"
        answers.send(BROKEN, os.fsencode(f"{path}: {text}"))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        text = f"cannot be decoded ({reason}); leave it out"
        answers.send(BROKEN, os.fsencode(f"{path}: {text}"))


def _listen(requests: "SimpleQueue[Any]", source: BinaryIO) -> None:
    """Pass requests on until the input closes: then the parent is gone, whatever runs here."""
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
        with suppress(ValueError, OSError):  # macOS takes no limit on address space
            _, hard = resource.getrlimit(which)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(which, (most, hard))


def main() -> None:
    """Answer requests until the parent is gone."""
    _limit_resources()
    source, output = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    requests: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests, source), daemon=True).start()
    answers = _Answers(output)
    listen(answers.alive)
    answers.send(ALIVE)
    while True:
        _answer(answers, requests.get())


if __name__ == "__main__":
    main()
