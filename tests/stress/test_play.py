"""Hostile and careless pages: nothing of them stays in the server."""

import json
import random
import threading
from contextlib import suppress

import pytest
from websockets.exceptions import ConnectionClosed

from benchmarks.measuring.page import Page
from driving_sim.play.serving import protocol, seat
from driving_sim.play.serving.server import Server
from driving_sim.play.starts import Start
from driving_sim.world_model import WorldModel
from tests.play.conftest import starts
from tests.play.serving.served import serving
from tests.town import drives, run, world

__all__ = ["drives", "run", "starts", "world"]

MESSAGES = 10_000
CONNECTIONS = 200
VALUES = [0, 1, -1, 0.5, 1e308, "", "a", "../..", None, True, [], {}, "speed=3 for 1s", "\u2028"]


def fuzzed(rng: random.Random) -> str | bytes:
    """Return a message that is nearly one of the protocol's."""
    kind = rng.choice(protocol.Message.__subclasses__())
    name = kind.model_fields["type"].annotation.__args__[0]  # type: ignore[union-attr]
    fields = {field: rng.choice(VALUES) for field in kind.model_fields if field != "type"}
    text = json.dumps({"type": name} | fields)
    match rng.randrange(4):
        case 0:
            at = rng.randrange(len(text))
            return text[:at] + rng.choice(["\x00", "{", '"', "9", ""]) + text[at + 1 :]
        case 1:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
        case _:
            return text


def leave_nothing(server: Server, threads: int) -> None:
    deadline = threading.Event()
    for _ in range(200):
        if not len(server.seats) and threading.active_count() <= threads:
            return
        deadline.wait(0.1)
    pytest.fail(f"{len(server.seats)} sessions, {threading.active_count()} threads are left")


def test_fuzzed_messages_harm_nobody_else(
    world: WorldModel, starts: dict[str, Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seat, "LOST_S", 0.0)
    rng = random.Random(0)
    server = Server(world, "town", starts, sessions=3, recordings=None)
    sent = 0
    with serving(server) as port, Page(port) as good:
        good.wait("frame")
        threads = threading.active_count()
        while sent < MESSAGES:
            with Page(port) as bad, suppress(ConnectionClosed):
                if bad.next()["type"] == "welcome":
                    for _ in range(50):
                        bad.socket.send(fuzzed(rng))
                        sent += 1
        frame = good.wait("frame")["frame"]
        good.steer(1.0)
        good.wait("frame", stamp=1.0)
        assert good.wait("frame")["frame"] > frame
        good.socket.close()
        leave_nothing(server, threads)


def test_dropped_connections_leave_nothing(
    world: WorldModel, starts: dict[str, Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seat, "LOST_S", 0.05)
    rng = random.Random(1)
    server = Server(world, "town", starts, sessions=3, recordings=None)
    with serving(server) as port:
        with Page(port) as page:
            page.wait("frame")
        threads = threading.active_count()
        for _ in range(CONNECTIONS):
            with Page(port) as page, suppress(ConnectionClosed):  # closed where all are busy
                for _ in range(rng.randrange(3)):
                    page.steer(rng.uniform(-1, 1))
                if rng.random() < 0.5:
                    page.socket.recv()
                if rng.random() < 0.3:
                    page.socket.socket.close()  # without a good-bye
        leave_nothing(server, threads)
