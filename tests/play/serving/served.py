"""A server of `drivesim play` in a thread."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from driving_sim.play.serving import protocol
from driving_sim.play.serving.server import Server, listen

_WAIT_S = 20.0


@contextmanager
def serving(server: Server, token: str | None = None) -> Iterator[int]:
    """Serve in a thread; yield the port."""
    socket = listen("127.0.0.1", 0)
    port: int = socket.getsockname()[1]
    hosts = None if token else ["127.0.0.1"]
    config = uvicorn.Config(
        server.app(hosts, token),
        log_level="error",
        ws_max_size=protocol.MOST_BYTES,
        timeout_graceful_shutdown=2,
    )
    served = uvicorn.Server(config)
    coroutine = served.serve(sockets=[socket])
    thread = threading.Thread(target=asyncio.run, args=[coroutine], daemon=True)
    thread.start()
    try:
        yield port
    finally:
        served.should_exit = True
        thread.join(_WAIT_S)
        assert not thread.is_alive()
