"""Bound what clients may cost Serve's HTTP proxy before the application sees a request.

Serve (2.60) calls `bound_headers` in every proxy process before it listens, and passes uvicorn no settings of ours.

- Size of heads: uvicorn (0.54) parses by httptools where that is installed, as it is with Serve. httptools joins the
  pieces of one header however long it grows, at a cost that grows with its square: one client without a key could hold
  the proxy until the controller takes it for dead. h11 refuses more than 16 KiB, trailers included.
- Time of heads: uvicorn waits for the rest of a head as long as the client likes. `BoundedProtocol` closes after 10 s.
  A request may be answered before its body ends: then the rest of it and the next head have 10 s together, so that the
  client can finish sending and read the answer. A connection that has had an answer may otherwise stay idle as long as
  Serve's `keep_alive_timeout_s` says.
- Connections of one address: each is an open file, of which a process has a limited number. When an address has too
  many, its connection that has waited longest for a head is closed for the new one, so that slow clients cannot shut
  out others of the same address. Where all of them have requests in progress, the new one is refused. A connection
  counts until its file is closed.
- Unread answers: asyncio keeps a closed connection open until its client has read everything. `BoundedProtocol` aborts
  a connection whose client reads nothing of an unsent answer for 60 s.
- Traces: Serve lets the `traceparent` header of a client decide whether a request is traced, before any key is looked
  at. The header is taken away, and the server's sampling ratio decides.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from typing import Any, cast

import h11
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.h11_impl import H11Protocol

from deployments.calls.proxy_limits import ProxyLimits

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # read by every proxy process as it starts
CALLBACK = "deployments.calls.h11_proxy:bound_headers"
_TRACE_HEADERS = (b"traceparent", b"tracestate")
_PREFIX_V6 = 64  # what one customer of a network has at least
_LATE = (408, "Request Timeout", "head_too_slow", "the head of the request did not come in time")
_TOO_MANY = (429, "Too Many Requests", "too_many_connections", "this address has too many open connections")


def bound_headers() -> list[Middleware]:
    """Make uvicorn use `BoundedProtocol` in this process from now on; return the middleware for Serve's proxy."""
    limits = ProxyLimits.from_environment(os.environ)
    # uvicorn takes a class where it documents an import path.
    HTTP_PROTOCOLS["auto"] = cast(Any, protocol_within(limits))
    return [] if limits.trusts_traceparent else [Middleware(WithoutTraceparent)]


class WithoutTraceparent:
    """ASGI middleware: take the headers away by which a client would decide what is traced."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            kept = [(name, value) for name, value in scope["headers"] if name.lower() not in _TRACE_HEADERS]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


class AddressBook:
    """The open connections of each address, those that wait for a head in the order in which they began to."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._counts: dict[str, int] = {}
        self._waiting: dict[str, dict[BoundedProtocol, None]] = {}

    def enter(self, address: str) -> bool:
        """Count a new connection. False: it is one too many, and none of the others can be closed for it."""
        if self._limit is not None and self._counts.get(address, 0) >= self._limit:
            oldest = next(iter(self._waiting.get(address, ())), None)
            if oldest is None:
                return False
            oldest.give_way()
        self._counts[address] = self._counts.get(address, 0) + 1
        return True

    def leave(self, address: str) -> None:
        self._counts[address] -= 1
        if not self._counts[address]:
            del self._counts[address]

    def waits(self, address: str, connection: BoundedProtocol) -> None:
        """Keep that this connection has no whole head."""
        self._waiting.setdefault(address, {})[connection] = None

    def waits_no_more(self, address: str, connection: BoundedProtocol) -> None:
        waiting = self._waiting.get(address, {})
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(address, None)

    @property
    def num_connections(self) -> int:
        return sum(self._counts.values())


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol over h11, with a deadline for heads and a bound on the connections of one address."""

    limits: ProxyLimits
    book: AddressBook
    _address: str | None = None  # None: not counted
    _deadline: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None  # runs while a part of an answer is unsent
    _has_begun = False  # whether a part of the next head has come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = address_of(self.client)
        if not self.book.enter(address):
            self._close(*_TOO_MANY, answers=True)
            return
        self._address = address
        self._await_head(with_deadline=True)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if not self._waits_for_head or self.transport.is_closing():
            self._head_is_here()
        else:
            self._has_begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
            self._await_head(with_deadline=True)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_reading()
        if self._waits_for_head and not self.transport.is_closing():
            rest_of_body = self.conn.their_state is h11.SEND_BODY
            self._await_head(with_deadline=rest_of_body or bool(self.conn.trailing_data[0]))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Forget the connection: another protocol takes it, and the application has no websockets to keep it by."""
        self._forget()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def give_way(self) -> None:
        """Abort this connection, which waits for a head, for a newer one of the same address.

        Do not wait for its client to read: the file must be free for the newer connection.
        """
        self._head_is_here()
        self.transport.abort()

    @property
    def _waits_for_head(self) -> bool:
        """Whether no request is in progress. Of one that was answered early, the rest of its body may still come."""
        is_answered_early = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        return is_answered_early or self.conn.their_state is h11.IDLE

    def _await_head(self, *, with_deadline: bool) -> None:
        """Start the time of a head, if it has one. What has come of the head does not start it anew."""
        if self._address is None:
            return
        self.book.waits(self._address, self)
        if with_deadline and self._deadline is None:
            self._deadline = self.loop.call_later(self.limits.head_timeout_s, self._head_is_late)

    def _head_is_here(self) -> None:
        self._has_begun = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._address is not None:
            self.book.waits_no_more(self._address, self)

    def _head_is_late(self) -> None:
        has_begun = self._has_begun
        self._head_is_here()
        if self.transport.get_write_buffer_size():  # the client has not read its earlier answers
            self.transport.abort()
        else:
            self._close(*_LATE, answers=has_begun)

    def _await_reading(self) -> None:
        """Start the time in which the client must read a part of what is unsent, if anything is."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._reading is None:
            self._reading = self.loop.call_later(self.limits.unread_timeout_s, self._check_reading, unsent)

    def _check_reading(self, unsent: int) -> None:
        self._reading = None
        if self.transport.get_write_buffer_size() == unsent:
            self.transport.abort()
        else:
            self._await_reading()

    def _forget(self) -> None:
        """Stop every timer, and count the connection no longer."""
        self._head_is_here()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if self._address is not None:
            self.book.leave(self._address)
            self._address = None

    def _close(self, status: int, reason: str, code: str, message: str, *, answers: bool) -> None:
        """Close. `answers`: with an error in the API's own shape, past h11, which takes none before a request."""
        if answers:
            body = f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null,"code":"{code}"}}}}'
            head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()
        self._await_reading()


def protocol_within(given: ProxyLimits) -> type[BoundedProtocol]:
    """Return the protocol with these limits. Its connections share one book of addresses."""

    class LimitedProtocol(BoundedProtocol):
        limits = given
        book = AddressBook(given.connections_per_address)

    return LimitedProtocol


def address_of(client: tuple[str, int] | None) -> str:
    """Return what connections are counted by: the IPv4 address, or the IPv6 network of one customer."""
    if client is None:
        return ""  # a Unix socket
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return client[0]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _PREFIX_V6), strict=False))
