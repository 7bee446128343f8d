"""Signs of life: slow work says that it goes on, so that whoever waits can tell it from a hang.

Decoding calls `beat` for every packet and picture, also for those that nobody asked for: the way to
a wanted frame may be long. Nobody listens but in a decoder process, which passes it on.
"""

from collections.abc import Callable

_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Say that the work goes on; costs next to nothing where nobody listens."""
    for listener in _listeners:
        listener()


def listen(listener: Callable[[], None]) -> None:
    """Call `listener` at every beat of this process from now on; it must be quick."""
    _listeners.append(listener)
