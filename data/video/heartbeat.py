"""Signs of life: slow work reports that it has not hung.

Decoding code calls `beat` for every packet and every picture. It does so even for pictures that
were not requested, because many of them may come before a requested one. Only decoder processes
listen; they forward the signs of life to their parent.
"""

from collections.abc import Callable

_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Report that the work has not hung. This costs almost nothing if there is no listener."""
    for listener in _listeners:
        listener()


def listen(listener: Callable[[], None]) -> None:
    """Call `listener` at every beat of this process from now on. The listener must be quick."""
    _listeners.append(listener)
