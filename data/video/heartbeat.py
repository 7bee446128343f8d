"""Signs of life: they tell a process that waits for slow work that the work has not hung.

Decoding calls `beat` for every packet and every picture, even those that nobody requested, because
many of them may come before a requested frame. Only a decoder process listens, and it passes the
signs on to its parent.
"""

from collections.abc import Callable

_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Report that the work goes on. This costs almost nothing if there is no listener."""
    for listener in _listeners:
        listener()


def listen(listener: Callable[[], None]) -> None:
    """Call `listener` at every beat of this process from now on. The listener must be quick."""
    _listeners.append(listener)
