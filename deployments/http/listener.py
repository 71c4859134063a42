"""Serve the application at an address of this machine, from the Ingress replica itself.

On one machine Serve's proxy is one more process between clients and Ingress: docs/benchmarks/index.md, "Over HTTP",
states what it costs. Connections have the proxy's protocol and limits. Serve counts requests of its proxies only, and
its request id is in the logs of those only; the project's own metrics and log lines cover both.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from contextlib import suppress
from typing import Any, cast

import uvicorn
from ray.serve.config import HTTPOptions
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.calls.h11_proxy import ID_HEADER, TrustedHeaders, protocol_within
from deployments.calls.proxy_limits import ProxyLimits

logger = logging.getLogger(__name__)

_BUSY_S, _POLL_S = 60.0, 0.25  # how long an earlier replica may keep the address
_BACKLOG = 2048  # connections that wait to be accepted
_HEALTH, _HEALTHY = "/-/healthz", "success"  # as Serve's proxy answers


class Listener:
    """Accepts connections from its creation on, and answers them after `start`, in the running event loop."""

    def __init__(self, app: ASGIApp, listening: socket.socket, limits: ProxyLimits | None = None) -> None:
        limits = limits or ProxyLimits.from_environment(os.environ)
        app = ProxyDuties(app)
        self._socket, self._is_stopping = listening, False
        config = uvicorn.Config(
            TrustedHeaders(app, limits),
            http=cast(Any, protocol_within(limits)),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_keep_alive=HTTPOptions().keep_alive_timeout_s,
        )
        self._server = uvicorn.Server(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    @property
    def has_failed(self) -> bool:
        """Return whether it no longer answers although nothing stopped it."""
        return self._serving is not None and self._serving.done() and not self._is_stopping

    def start(self) -> None:
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    def stop(self) -> None:
        """Accept no more connections. Requests in progress go on as long as the process does."""
        self._is_stopping = self._server.should_exit = True

    async def stopped(self, within_s: float | None = None) -> bool:
        """Stop, and wait until all requests are answered, or for `within_s`. Return whether they are."""
        self.stop()
        if self._serving is None:
            self._socket.close()
            return True
        ended, _ = await asyncio.wait([self._serving], timeout=within_s)
        return bool(ended)

    async def ended(self) -> None:
        """Wait until it no longer answers."""
        if self._serving is not None:
            await self._serving

    async def _serve(self) -> None:
        try:
            await self._server.serve([self._socket])
        except Exception:
            logger.exception("the HTTP listener has failed")
        finally:
            self._socket.close()


async def listening_at(host: str, port: int, within_s: float = _BUSY_S) -> socket.socket:
    """Return a socket that listens there, once an earlier replica has left the address.

    Raises: OSError if the address cannot be used.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            return _listening(host, port)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        await asyncio.sleep(_POLL_S)


class ProxyDuties:
    """ASGI middleware: answer health checks, return the request's id, and cancel a request whose client has left.

    A client that leaves is noticed once the application has read the whole body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == _HEALTH:
            await PlainTextResponse(_HEALTHY)(scope, receive, send)
        else:
            await _Request(self._app, scope, receive, send).run()


class _Request:
    """One request and its answer."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app, self._scope, self._receive, self._send = app, scope, receive, send
        self._id = Headers(scope=scope).get(ID_HEADER)
        self._arrived: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)  # the rest of a body waits with the client
        self._is_answered = False

    async def run(self) -> None:
        """Return when the request is answered, or cancelled because its client has left."""
        answering = asyncio.create_task(self._call_app())
        reading = asyncio.create_task(self._read())
        try:
            await asyncio.wait((answering, reading), return_when=asyncio.FIRST_COMPLETED)
            if self._is_answered or answering.done():
                await answering
        finally:
            for task in (answering, reading):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await reading
            with suppress(asyncio.CancelledError):
                await answering

    async def _call_app(self) -> None:
        await self._app(self._scope, self._arrived.get, self._answer)

    async def _read(self) -> None:
        """Pass on the body, and return when the client has left, or has its answer."""
        while (message := await self._receive())["type"] != "http.disconnect":
            await self._arrived.put(message)

    async def _answer(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._id is not None:
            MutableHeaders(scope=message)[ID_HEADER] = self._id
        self._is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens there, also while connections of an earlier replica are ending."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return listening
