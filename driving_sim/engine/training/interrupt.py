"""Turn SIGTERM and Ctrl-C into a request to stop, for a loop that first saves its state."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopNow(BaseException):
    """Raised to stop the work inside `StopRequest.interruptible`. It does not mean an error."""


class StopRequest:
    """A request to stop: `signal` is the number of the signal that arrived, or 0 if none has."""

    def __init__(self) -> None:
        self.signal = 0
        self._interruptible = False
        self._over = RawValue("b", 0)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal stop the work in this context, which may be left incomplete.

        The signal raises `StopNow` once, between two lines of Python. If the signal arrived before,
        `StopNow` is raised at once.
        """
        self._interruptible = True
        try:
            self._stop_if_requested()
            yield
        finally:
            self._interruptible = False

    def receive(self, number: int) -> None:
        """Record the signal that arrived, and raise `StopNow` if the work is interruptible."""
        self.signal = number
        self._stop_if_requested()

    def _stop_if_requested(self) -> None:
        if self.signal and self._interruptible:
            self._interruptible = False  # do not interrupt the cleanup of the stopped work
            raise StopNow

    def shield(self, _worker: int = 0) -> None:
        """Make a data worker ignore signals; call it in the worker.

        Signals reach the whole process group, but the training process needs its workers to finish
        a step. After the end of `stop_on_signals`, SIGTERM ends the worker again, because
        multiprocessing sends SIGTERM at exit and waits for the worker.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._leave_when_over)

    def end_shield(self) -> None:
        """Let SIGTERM end the workers again."""
        self._over.value = 1

    def _leave_when_over(self, _number: int, _frame: FrameType | None) -> None:
        if self._over.value:
            os._exit(0)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yield a request that records the first SIGTERM or Ctrl-C; a second signal acts as usual.

    Outside the main thread Python allows no signal handlers, so every signal acts as usual.
    """
    request = StopRequest()
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if is_main else {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        restore()
        name = signal.Signals(number).name
        text = f"{name}: saving, then stopping (send it again to stop at once)\n"
        os.write(2, text.encode())  # print is not reentrant, and may be what the signal interrupted
        request.receive(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
        request.end_shield()
