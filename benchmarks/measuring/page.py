"""A page of `drivesim play` without a browser: it sends and receives what the real page does."""

import json
import struct
from typing import Any, Self

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from driving_sim.play.serving import protocol

_WAIT_S = 20.0


class Page:
    """A connection to the server. Use it in a `with` block."""

    def __init__(self, port: int, *, session: str | None = None, **more: Any) -> None:
        self._connecting = connect(f"ws://127.0.0.1:{port}/drive", max_size=None, **more)
        self._session = session
        self.socket: ClientConnection

    def __enter__(self) -> Self:
        """Connect and say hello."""
        self.socket = self._connecting.__enter__()
        self.send("hello", version=protocol.VERSION, session=self._session)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._connecting.__exit__(None, None, None)

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message."""
        self.socket.send(json.dumps({"type": kind} | fields))

    def steer(self, wheel: float, *, throttle: float = 0.0, stamp: float = 1.0) -> None:
        """Send how the wheel and the throttle are held."""
        self.send("control", wheel=wheel, throttle=throttle, brake=0.0, stamp=stamp)

    def next(self) -> dict[str, Any]:
        """Return the next message; for a binary one its header, with its parts as bytes."""
        message = self.socket.recv(_WAIT_S)
        if isinstance(message, str):
            return dict(json.loads(message))
        (length,) = struct.unpack("<I", message[:4])
        header = dict(json.loads(message[4 : 4 + length]))
        at, parts = 4 + length, []
        for size in header["parts"]:
            parts.append(message[at : at + size])
            at += size
        return header | {"parts": parts}

    def wait(self, kind: str, **expected: Any) -> dict[str, Any]:
        """Return the next message of a kind with the expected fields; skip others."""
        while True:
            message = self.next()
            if message["type"] == kind and expected.items() <= message.items():
                return message

    def rest(self) -> list[dict[str, Any]]:
        """Return all messages until the server closes the connection."""
        messages = []
        try:
            while True:
                messages.append(self.next())
        except ConnectionClosed:
            return messages
