"""The messages between the page and the server, version 1.

The page sends text: one JSON object a message, whose `type` names one of the classes below. The
server answers with JSON too, and sends frames as binary messages: the length of a JSON header
(uint32, little endian), the header, and the parts whose lengths the header lists in `parts`.
"""

import json
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from driving_sim.engine import progress
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, shown

VERSION = 1
MOST_BYTES = 4096
"""Largest message that the server accepts, in bytes."""

_Share = Annotated[float, Field(ge=0, le=1)]
_Lock = Annotated[float, Field(ge=-1, le=1)]
_Stamp = Annotated[float, Field(ge=0, le=1e15)]


class Message(BaseModel):
    """A message from the page."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Hello(Message):
    """The first message of a connection. The server answers with `welcome`, `busy` or `end`."""

    type: Literal["hello"]
    version: int
    session: Annotated[str, Field(max_length=64)] | None = None
    """Session to take up again after a lost connection, from an earlier `welcome`."""


class Control(Message):
    """How the driver holds the wheel and the pedals, until the next such message."""

    type: Literal["control"]
    wheel: _Lock
    """Where the wheel is turned to: 1 is fully left, -1 fully right."""
    throttle: _Share
    brake: _Share
    stamp: _Stamp
    """The page's clock in ms. The first frame that obeys this message carries it back."""


class Pause(Message):
    """Pause, or drive on."""

    type: Literal["pause"]
    paused: bool


class Step(Message):
    """Pause, and drive one frame further."""

    type: Literal["step"]


class Reset(Message):
    """Begin again, from the same start or another one."""

    type: Literal["reset"]
    start: Annotated[str, Field(max_length=200)] | None = None
    """Name of a start in `welcome`; None stands for the current one."""


class Rewind(Message):
    """Go back by some seconds, or as far as the session remembers; then pause."""

    type: Literal["rewind"]
    seconds: Annotated[float, Field(gt=0, le=3600)]


class Settings(Message):
    """Change how tokens are drawn, from the next frame on."""

    type: Literal["settings"]
    temperature: Annotated[float, Field(ge=0, le=10)]
    guidance: Annotated[float, Field(ge=0, le=20)]
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)]


class HandOver(Message):
    """Hand the wheel to a script, a named plan or `recorded`; None takes it back."""

    type: Literal["hand_over"]
    plan: Annotated[str, Field(max_length=1000)] | None


class WhatIf(Message):
    """Pause, and show what would follow from left, straight and right."""

    type: Literal["what_if"]


class Record(Message):
    """Begin a recording at the current frame, or end it and keep it."""

    type: Literal["record"]
    on: bool


class Ping(Message):
    """Ask for `pong`, which carries the stamp back. It does not count as a sign of the driver."""

    type: Literal["ping"]
    stamp: _Stamp


AnyMessage = (
    Hello | Control | Pause | Step | Reset | Rewind | Settings | HandOver | WhatIf | Record | Ping
)
_MESSAGES: TypeAdapter[AnyMessage] = TypeAdapter(Annotated[AnyMessage, Field(discriminator="type")])


def parse(received: str) -> AnyMessage:
    """Read a message from the page. Raises DriveSimError if it is malformed."""
    try:
        return _MESSAGES.validate_json(received)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "message"
        raise DriveSimError(
            f"a message that this version does not know: {shown(place)}: {one_line(first['msg'])}"
        ) from None


def text(kind: str, **fields: Any) -> str:
    """Return a message of the server as JSON."""
    return json.dumps({"type": kind, **fields}, allow_nan=False)


def said(kind: str, line: str) -> str:
    """Return a message of the server with a line for the driver."""
    return text(kind, text=progress.wording(line))


def binary(kind: str, header: dict[str, Any], parts: Sequence[bytes]) -> bytes:
    """Return a binary message of the server: header length, header, and parts."""
    lengths = [len(part) for part in parts]
    head = text(kind, **header, parts=lengths).encode("utf-8")
    return b"".join([struct.pack("<I", len(head)), head, *parts])
