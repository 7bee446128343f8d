"""SIGTERM and Ctrl-C as a request that a loop can honour when its state is whole."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopNow(BaseException):
    """Breaks off what runs inside `StopRequest.interruptible`; no error, as KeyboardInterrupt."""


class StopRequest:
    """Holds the signal that arrived, 0 while none has."""

    def __init__(self) -> None:
        self.signal = 0
        self._interruptible = False
        self._over = RawValue("b", 0)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For work that may be dropped half done: a signal raises `StopNow` inside, once.

        It does so between two lines of Python, and where the signal came before at once.
        """
        self._interruptible = True
        try:
            self._break_off()
            yield
        finally:
            self._interruptible = False

    def receive(self, number: int) -> None:
        """Keep the signal that arrived; break off what may be."""
        self.signal = number
        self._break_off()

    def _break_off(self) -> None:
        if self.signal and self._interruptible:
            self._interruptible = False  # what cleans up inside is not disturbed again
            raise StopNow

    def shield(self, _worker: int = 0) -> None:
        """Call it in a data worker: signals to the whole process group leave it running.

        The parent still needs it while it finishes its step. Once `stop_on_signals` is left,
        SIGTERM ends it again: multiprocessing sends one at exit, and waits for the worker.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._leave_when_over)

    def end_shield(self) -> None:
        """Let SIGTERM end the workers."""
        self._over.value = 1

    def _leave_when_over(self, _number: int, _frame: FrameType | None) -> None:
        if self._over.value:
            os._exit(0)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, the first SIGTERM or Ctrl-C is kept in the yielded request; a second one acts.

    Outside the main thread, where Python allows no handlers, signals keep their meaning.
    """
    request = StopRequest()
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if is_main else {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        restore()
        text = f"{signal.Signals(number).name}: saving, then stopping (again to stop at once)\n"
        os.write(2, text.encode())  # print may be what was interrupted: it is not reentrant
        request.receive(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
        request.end_shield()
