"""Refuse requests from other pages and other hosts, and those without the token."""

import re
import secrets
from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

_COOKIE = "drivesim-token"
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Guard:
    """Lets through what comes from the server's own page.

    A page elsewhere has another Origin. A page whose name someone let point to this machine has
    another Host. Where the server listens to other machines, a token in the address keeps out
    everyone who was not given it. A cookie carries it on to what the page itself asks for.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] | None, token: str | None) -> None:
        """Guard `app`. `hosts` are the host names that requests may use; None allows all."""
        self._app, self._token = app, token
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with safe headers in its response, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif reason := self._objection(scope):
            if scope["type"] == "websocket":
                await WebSocketClose(1008, reason)(scope, receive, send)
            else:
                await PlainTextResponse(f"{reason}\n", 403)(scope, receive, send)
        else:
            await self._app(
                scope, receive, self._with_headers(send, Headers(scope=scope).get("host", ""))
            )

    def _objection(self, scope: Scope) -> str | None:
        """Return why a request is refused, or None."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and _name(f"http://{host}") not in self._hosts:
            return "open the page by the address that `drivesim play` printed"
        if origin is not None and origin.partition("://")[2] != host:
            return "another page may not drive here"
        if self._token is not None and not self._has_token(scope, headers):
            return "the address lacks the token that `drivesim play` printed"
        return None

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        cookies = [cookie.strip().partition("=") for cookie in headers.get("cookie", "").split(";")]
        given = [*asked, *(value for name, _, value in cookies if name == _COOKIE)]
        token = (self._token or "").encode()
        return any(secrets.compare_digest(value.encode(), token) for value in given)

    def _with_headers(self, send: Send, host: str) -> Send:
        headers = {**_HEADERS, "Content-Security-Policy": _policy(host)}
        if self._token is not None:
            headers["Set-Cookie"] = f"{_COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
        extra = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        return sent


def _policy(host: str) -> str:
    """Return the page's policy: everything comes from this server, and nobody frames it."""
    # Older versions of Safari do not count sockets as 'self'.
    own = f"ws://{host} wss://{host}" if re.fullmatch(r"[\w.:\[\]-]+", host) else ""
    return (
        "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; "
        f"connect-src 'self' {own}"
    )


def _name(address: str) -> str | None:
    """Return the host name in an address, without the port."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
