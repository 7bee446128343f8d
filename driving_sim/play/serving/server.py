"""The server of `drivesim play`: serves the page, and connects it to a session."""

import asyncio
import contextlib
import errno
import secrets
import socket
import time
import webbrowser
from collections.abc import AsyncIterator, Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from statistics import median
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from driving_sim.data.actions.action_log import UNITS
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import say
from driving_sim.engine.threads import spare_cores
from driving_sim.play.car import Held
from driving_sim.play.drive import Drive
from driving_sim.play.serving import protocol
from driving_sim.play.serving.guard import Guard
from driving_sim.play.serving.outbox import Outbox
from driving_sim.play.serving.packing import most_bits, packed_sight, png
from driving_sim.play.serving.seat import Seat
from driving_sim.play.serving.seats import Seats
from driving_sim.play.serving.workers import Workers
from driving_sim.play.starts import Start
from driving_sim.world_model.world_model import WorldModel

PAGE = Path(__file__).parents[1] / "page"
_HELLO_S = 5.0
_MOST_PER_S = 100
_SAVED_UP = 1000  # after a stall of the network, many messages come at once
_REFUSED = (1007, 1009)  # codes of a socket closed by uvicorn: not UTF-8, too long
_TRIED_FRAMES = 5  # number of frames that are timed without one of the cores
_BUSY = 0.8  # largest share of the time that the frames of all drivers may take then
_PORTS = 20  # number of ports that are tried


class Server:
    """A world model, its starts and its sessions, as a web application."""

    def __init__(
        self,
        world: WorldModel,
        name: str,
        starts: Mapping[str, Start],
        *,
        sessions: int,
        recordings: Path | None,
    ) -> None:
        self._world, self._name, self._starts = world, name, starts
        self._recordings, self._sessions = recordings, sessions
        self._workers = Workers()
        self._new_drive = partial(Drive, world, name, starts)
        self.seats = Seats(sessions, self._new_drive, self._workers, recordings)

    def warm_up(self) -> None:
        """Drive a few frames, so that the first driver need not wait for kernels to be compiled.

        If the model keeps its rate for all drivers without one of the cores, that core is left to
        the browser from then on.
        """
        drive = self._new_drive()
        longest = _BUSY / (self._world.fps * self._sessions)

        def seconds() -> float:
            began = time.perf_counter()
            packed_sight(self._world, drive.step(Held(1.0, 1.0)), {})
            return time.perf_counter() - began

        def try_out() -> None:
            if [seconds() for _ in range(3)][-1] > longest:
                return
            spare_cores(1)
            if median(seconds() for _ in range(_TRIED_FRAMES)) > longest:
                spare_cores(0)

        self._workers.wait_for(try_out)  # each thread has its own number of torch threads
        drive.close()

    def app(self, hosts: list[str] | None = None, token: str | None = None) -> Guard:
        """Return the application, for requests with one of `hosts` as Host, and with `token`."""
        routes = [
            Route("/starts/{number}.png", self._picture),
            WebSocketRoute("/drive", self._talk),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        return Guard(Starlette(routes=routes, lifespan=self._lifespan), hosts, token)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await self.seats.close()
        self._workers.close()

    async def _picture(self, request: Request) -> Response:
        pictures = {str(n): start for n, start in enumerate(self._starts.values())}
        start = pictures.get(request.path_params["number"])
        if start is None:
            return PlainTextResponse("no such start\n", 404)
        frame = start.context.frames[-1]
        return Response(await self._workers.pack(partial(png, frame)), media_type="image/png")

    async def _talk(self, socket: WebSocket) -> None:
        """Connect a page to a session until one of the two ends."""
        await socket.accept()
        try:
            async with asyncio.timeout(_HELLO_S):
                first = await socket.receive_text()
        except (TimeoutError, WebSocketDisconnect, KeyError):  # KeyError: it was not text
            return
        seat = await self._seated(first)
        if isinstance(seat, str):
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await socket.send_text(seat)
                await socket.close()
            return
        outbox = seat.connect(self._welcome())
        tasks = [
            asyncio.create_task(_send(socket, outbox)),
            asyncio.create_task(_receive(socket, seat)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if seat.ended is not None:  # let the page know why
                await asyncio.wait(tasks[:1], timeout=_HELLO_S)
        finally:
            seat.disconnect(outbox)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _seated(self, first: str) -> Seat | str:
        """Return the session for a page's first message, or the message that refuses one."""
        try:
            hello = protocol.parse(first)
            if not isinstance(hello, protocol.Hello):
                raise DriveSimError("the first message must be hello")
            if hello.version != protocol.VERSION:
                raise DriveSimError(
                    f"the page speaks version {hello.version}, this server {protocol.VERSION}; "
                    "reload the page"
                )
        except DriveSimError as error:
            return protocol.said("end", str(error))
        try:
            return await self.seats.take(hello.session)
        except DriveSimError as error:
            return protocol.said("busy", str(error))

    def _welcome(self) -> dict[str, Any]:
        world, statistics = self._world, self._world.statistics
        slowest, fastest = statistics.speed_limits
        has_speed, has_steering = world.known_channels
        kind = world.steering_kind
        return {
            "version": protocol.VERSION,
            "model": {
                "name": self._name,
                "fingerprint": world.fingerprint,
                "fps": world.fps,
                "height": world.tokenizer.height,
                "width": world.tokenizer.width,
                "rows": world.tokenizer.rows,
                "cols": world.tokenizer.cols,
                "precision": world.precisions["world_model"],
            },
            "channels": {
                "speed": {"lowest": slowest, "highest": fastest, "unit": "m/s"}
                if has_speed
                else None,
                "steering": {"limit": statistics.steering_p99, "unit": UNITS[kind], "kind": kind}
                if has_steering and kind
                else None,
            },
            "starts": [
                {
                    "name": start.name,
                    "picture": f"starts/{number}.png",
                    "has_recording": start.has_recording,
                }
                for number, start in enumerate(self._starts.values())
            ],
            "most_bits": most_bits(world),
            "can_record": self._recordings is not None,
        }


async def _send(socket: WebSocket, outbox: Outbox) -> None:
    """Send what the outbox holds until it is closed; then close the connection."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while (message := await outbox.next()) is not None:
            if isinstance(message, str):
                await socket.send_text(message)
            else:
                await socket.send_bytes(message)
        await socket.close()


async def _receive(socket: WebSocket, seat: Seat) -> None:
    """Give the page's messages to the session. A wrong one, or too many, ends the session."""
    allowance, last = float(_SAVED_UP), time.monotonic()
    try:
        while seat.ended is None:
            message = protocol.parse(await socket.receive_text())
            now = time.monotonic()
            allowance = min(allowance + (now - last) * _MOST_PER_S, _SAVED_UP) - 1
            last = now
            if allowance < 0:
                raise DriveSimError(f"the page sent more than {_MOST_PER_S} messages a second")
            if isinstance(message, protocol.Hello):
                raise DriveSimError("hello came twice")
            seat.receive(message)
    except WebSocketDisconnect as gone:
        if gone.code in _REFUSED:
            seat.end("the page sent a message that is too long or no text")
    except KeyError:
        seat.end("the page sent a binary message")
    except DriveSimError as error:
        seat.end(str(error))


def serve(server: Server, listening: socket.socket, host: str, *, open_browser: bool) -> None:
    """Serve on a socket from `listen` until the user stops it.

    Prints the address, and opens a browser there. If other machines can reach it, the address has a
    token, without which nobody gets in.
    """
    port = listening.getsockname()[1]
    is_local = _is_loopback(host)
    token = None if is_local else secrets.token_urlsafe(16)
    names = ["127.0.0.1", "localhost", "::1", host] if is_local else None
    for address in _addresses(host, port, token):
        say(f"drive at {address} (stop with Ctrl-C)")
    if open_browser and not _opens(_addresses(host, port, token)[0]):
        say("no browser was found here; open the address in one")
    config = uvicorn.Config(
        server.app(names, token),
        log_level="error",
        ws_max_size=protocol.MOST_BYTES,
        ws_ping_interval=10,
        ws_ping_timeout=10,
        ws_per_message_deflate=False,  # pictures are packed already
        timeout_graceful_shutdown=5,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `port`, or on the next free one after it.

    Raises DriveSimError if none is free, or if the machine has no address `host`.
    """
    for candidate in range(port, min(port + _PORTS, 65536)):
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, candidate), family=family)
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                continue
            reason = error.strerror if isinstance(error, OSError) else "no such name"
            raise DriveSimError(
                f"cannot listen on `host` {host}, `port` {candidate}: {reason}"
            ) from error
        if candidate != port:
            say(f"port {port} is in use, so this is port {candidate}")
        return listening
    raise DriveSimError(f"`port` {port}: it and the next {_PORTS - 1} are in use; choose another")


def _addresses(host: str, port: int, token: str | None) -> list[str]:
    """Return the addresses of the page, first the one to open on this machine."""
    query = f"?token={token}" if token else ""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    if host in everywhere:
        hosts = [everywhere[host], socket.gethostname()]
    else:
        hosts = [f"[{host}]" if ":" in host else host]
    return [f"http://{name}:{port}/{query}" for name in hosts]


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _opens(address: str) -> bool:
    """Open a browser with a window of its own; return whether there is one.

    One in the terminal would wait for the page before there is a server.
    """
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    is_command = isinstance(browser, webbrowser.GenericBrowser)
    if is_command and not isinstance(browser, webbrowser.BackgroundBrowser):
        return False
    return getattr(browser, "background", True) and browser.open(address)
