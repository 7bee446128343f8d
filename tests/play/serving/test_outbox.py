import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from driving_sim.play.serving import outbox as module
from driving_sim.play.serving.outbox import Outbox


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(work, 5)

    return asyncio.run(limited())


async def all_of(outbox: Outbox) -> list[str | bytes]:
    sent = []
    while (message := await outbox.next()) is not None:
        sent.append(message)
    return sent


def test_messages_keep_their_order_and_old_frames_are_dropped() -> None:
    async def work() -> None:
        outbox = Outbox()
        outbox.put("a")
        outbox.show(b"1")
        outbox.put("b")
        outbox.show(b"2")
        assert [await outbox.next() for _ in range(3)] == ["a", "b", b"2"]
        outbox.show(b"3")
        assert await outbox.next() == b"3"

    run(work())


def test_the_last_message_is_the_one_it_was_closed_with() -> None:
    async def work() -> None:
        outbox = Outbox()
        outbox.put("a")
        outbox.show(b"1")
        outbox.close("bye")
        outbox.put("late")
        outbox.show(b"late")
        assert await all_of(outbox) == ["a", "bye"]

    run(work())


def test_a_page_that_reads_nothing_is_given_up() -> None:
    async def work() -> None:
        outbox = Outbox()
        for _ in range(module._MOST_WAITING + 5):
            outbox.put("x")
        assert await all_of(outbox) == []

    run(work())


def test_large_messages_wait_until_others_are_sent_or_nobody_reads() -> None:
    async def work() -> None:
        outbox = Outbox()
        for _ in range(module._FEW):
            await outbox.put_slowly(b"large")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(outbox.put_slowly(b"one more"), 0.1)
        await outbox.next()
        await asyncio.wait_for(outbox.put_slowly(b"one more"), 1)
        waiting = asyncio.create_task(outbox.put_slowly(b"another"))
        outbox.abandon()
        await asyncio.wait_for(waiting, 1)

    run(work())
