"""The two threads that all sessions share: one computes frames, the other one packs pictures."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """One thread for the model and one for pictures.

    A frame is packed while the next one is computed. Sessions take turns on the model, because two
    passes at once would only take the cores away from each other.
    """

    def __init__(self) -> None:
        self._model = ThreadPoolExecutor(1, "model")
        self._pictures = ThreadPoolExecutor(1, "pictures")

    async def compute(self, work: Callable[[], T]) -> T:
        """Run `work` in the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._model, work)

    def wait_for(self, work: Callable[[], T]) -> T:
        """Run `work` in the model's thread, before there is an event loop."""
        return self._model.submit(work).result()

    def pack(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run `work` in the pictures' thread, after what was given to it before."""
        return asyncio.get_running_loop().run_in_executor(self._pictures, work)

    def close(self) -> None:
        """Wait for both threads to end."""
        self._model.shutdown()
        self._pictures.shutdown()
