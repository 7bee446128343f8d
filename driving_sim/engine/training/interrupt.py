"""Turn SIGTERM and Ctrl-C into a request to stop, so a loop can save its state before it stops."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopNow(BaseException):
    """Raised by a signal to stop the work inside `StopRequest.interruptible`. It is no error."""


class StopRequest:
    """A request to stop. `signal` is the number of the signal that arrived, or 0 before that."""

    def __init__(self) -> None:
        self.signal = 0
        self._interruptible = False
        self._over = RawValue("b", 0)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal stop the work in this context at any point.

        The signal raises `StopNow` once, between two lines of Python. If a signal arrived before
        this context was entered, `StopNow` is raised at once.
        """
        self._interruptible = True
        try:
            self._stop_if_requested()
            yield
        finally:
            self._interruptible = False

    def receive(self, number: int) -> None:
        """Record signal `number`. Raise `StopNow` if the program is inside `interruptible`."""
        self.signal = number
        self._stop_if_requested()

    def _stop_if_requested(self) -> None:
        if self.signal and self._interruptible:
            self._interruptible = False  # do not interrupt the cleanup of the stopped work
            raise StopNow

    def shield(self, _worker: int = 0) -> None:
        """Make a data worker ignore signals. Call this in the worker process.

        Signals reach the whole process group, but the training process still needs its workers to
        finish a step. After the end of `stop_on_signals`, SIGTERM ends the workers again. This is
        necessary because at exit, multiprocessing sends SIGTERM to the workers and waits for them.
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
    """Yield a `StopRequest`, which is set by the first SIGTERM or Ctrl-C.

    A second signal has its usual effect. Outside the main thread, Python allows no signal handlers,
    so all signals have their usual effect.
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
        # Do not use print: it is not reentrant, and the signal may have interrupted a print.
        os.write(2, text.encode())
        request.receive(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
        request.end_shield()
