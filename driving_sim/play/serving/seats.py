"""The sessions of the server: who drives, and whether another driver fits in."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from driving_sim.engine.errors import DriveSimError, is_out_of_memory
from driving_sim.play.drive import Drive
from driving_sim.play.serving.seat import Seat
from driving_sim.play.serving.workers import Workers


class Seats:
    """At most `most` sessions at a time, each with a drive and a task of its own."""

    def __init__(
        self, most: int, new_drive: Callable[[], Drive], workers: Workers, recordings: Path | None
    ) -> None:
        self._most, self._new_drive = most, new_drive
        self._workers, self._recordings = workers, recordings
        self._taken: dict[str, tuple[Seat, asyncio.Task[None]]] = {}
        self._coming = 0

    def __len__(self) -> int:
        return len(self._taken)

    async def take(self, session: str | None) -> Seat:
        """Return the session that a page asks for if it still goes on, or else a new one.

        Raises DriveSimError if all sessions are in use, or if there is no memory for another one.
        """
        seat, _ = self._taken.get(session or "", (None, None))
        if seat is not None and seat.ended is None:
            return seat
        if len(self._taken) + self._coming >= self._most:
            raise DriveSimError(
                f"{self._most} of {self._most} sessions are in use; try again later, or start the "
                "server with more `sessions`"
            )
        self._coming += 1
        try:
            drive = await self._workers.compute(self._new_drive)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise DriveSimError("there is no memory for another driver; try again later") from error
        finally:
            self._coming -= 1
        seat = Seat(drive, self._workers, self._recordings)
        task = asyncio.create_task(seat.run())
        self._taken[seat.id] = (seat, task)
        task.add_done_callback(lambda _: self._taken.pop(seat.id))
        return seat

    async def close(self) -> None:
        """End all sessions; their recordings are kept."""
        taken = list(self._taken.values())
        for seat, _ in taken:
            seat.end("the server has stopped")
        await asyncio.gather(*(task for _, task in taken), return_exceptions=True)
