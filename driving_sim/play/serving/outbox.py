"""What waits to be sent to a page. It is bounded, so the world never waits for a slow viewer."""

import asyncio
from collections import deque

_MOST_WAITING = 128
_FEW = 4
_PAUSE_S = 0.02


class Outbox:
    """Messages in their order, and the newest frame, which replaces one that was not sent yet."""

    def __init__(self) -> None:
        self._messages: deque[str | bytes] = deque()
        self._frame: bytes | None = None
        self._closed = False
        self._filled = asyncio.Event()

    def put(self, message: str | bytes) -> None:
        """Add a message. If too many wait, nobody reads them: close the outbox."""
        if self._closed:
            return
        if len(self._messages) >= _MOST_WAITING:
            self.abandon()
        else:
            self._messages.append(message)
            self._filled.set()

    async def put_slowly(self, message: bytes) -> None:
        """Add a large message once few others wait."""
        while len(self._messages) >= _FEW and not self._closed:
            await asyncio.sleep(_PAUSE_S)
        self.put(message)

    def show(self, frame: bytes) -> None:
        """Let a frame be sent after the messages, instead of an older one that still waits."""
        if not self._closed:
            self._frame = frame
            self._filled.set()

    def close(self, message: str) -> None:
        """Add a last message, and take no more."""
        self._frame = None
        self.put(message)
        self._closed = True

    def abandon(self) -> None:
        """Forget everything, and take no more: nobody reads it."""
        self._messages.clear()
        self._frame, self._closed = None, True
        self._filled.set()

    async def next(self) -> str | bytes | None:
        """Wait for the next thing to send; None once everything is sent and the outbox closed."""
        while not self._messages and self._frame is None:
            if self._closed:
                return None
            self._filled.clear()
            await self._filled.wait()
        if self._messages:
            return self._messages.popleft()
        frame, self._frame = self._frame, None
        return frame
