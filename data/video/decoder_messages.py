"""What a decoder process and its parent say to each other: a kind, a JSON head, and raw bytes.

Nothing is pickled: the one side handles hostile files, and the other must not run what it sends.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driving_sim.data.video.file_facts import VideoFacts

READY, REQUEST, ALIVE, FACTS, FRAMES, ERROR = b"R", b"Q", b"A", b"I", b"F", b"E"
"""Kinds of messages; all but REQUEST come from the decoder."""
_KINDS = (READY, REQUEST, ALIVE, FACTS, FRAMES, ERROR)
_PREFIX = struct.Struct("<cIQ")
_MOST_HEAD_BYTES = 1 << 20
_MOST_BYTES = 1 << 32
_ARRAYS = {"timestamps": np.float64, "pts": np.int64, "keyframes": np.int64}

Head = dict[str, Any]
Body = NDArray[np.uint8]


def start(kind: bytes, head: Head | None = None, body_bytes: int = 0) -> bytes:
    """All of a message but its body, which comes right after it."""
    text = json.dumps(head).encode() if head else b""
    return _PREFIX.pack(kind, len(text), body_bytes) + text


def receive(
    fill: Callable[[memoryview], None], into: Body | None = None
) -> tuple[bytes, Head, Body]:
    """The next message: its kind, head and body.

    `fill` fills a buffer or raises. A body that fits goes straight `into` an array. Raises
    ValueError for what is no message.
    """
    prefix = bytearray(_PREFIX.size)
    fill(memoryview(prefix))
    kind, head_bytes, body_bytes = _PREFIX.unpack(prefix)
    # Printed text must not pass for a long message that never ends.
    if kind not in _KINDS or head_bytes > _MOST_HEAD_BYTES or body_bytes > _MOST_BYTES:
        raise ValueError(f"a message {kind!r} of {head_bytes:,} and {body_bytes:,} bytes")
    head = bytearray(head_bytes)
    fill(memoryview(head))
    fits = into is not None and into.nbytes == body_bytes
    body = into if into is not None and fits else np.empty(body_bytes, np.uint8)
    fill(body.reshape(-1).data)
    return kind, json.loads(head) if head else {}, body


def pack_facts(facts: VideoFacts, indices: NDArray[np.int64] | None = None) -> tuple[Head, bytes]:
    """Head and body that hold a video's description, and frame numbers after it."""
    head: Head = {field.name: getattr(facts, field.name) for field in fields(facts)}
    arrays = {name: head.pop(name) for name in _ARRAYS}
    if indices is not None:
        arrays["indices"] = indices
    head["path"] = str(facts.path)
    head["lengths"] = {name: len(each) for name, each in arrays.items() if each is not None}
    return head, b"".join(each.tobytes() for each in arrays.values() if each is not None)


def unpack_facts(head: Head, body: Body) -> tuple[VideoFacts, NDArray[np.int64]]:
    """What `pack_facts` was given. Raises ValueError, KeyError or TypeError for anything else."""
    arrays: dict[str, NDArray[Any] | None] = {"pts": None, "indices": np.empty(0, np.int64)}
    for name, length in head.pop("lengths").items():
        part, body = body[: 8 * length], body[8 * length :]
        arrays[name] = part.view(_ARRAYS.get(name, np.int64))
    indices: Any = arrays.pop("indices")
    path = Path(head.pop("path"))
    return VideoFacts(path=path, **head, **arrays), indices  # type: ignore[arg-type]
