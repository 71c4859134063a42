"""Limit what clients can cost Serve's HTTP proxy before the application sees a request.

Serve (2.60) calls `bound_headers` in every proxy process before it listens, and passes none of our settings to uvicorn.

- Size of heads: uvicorn (0.54) parses with httptools if that is installed, as it is with Serve. httptools joins the
pieces of one header at a cost that grows with its square, without a limit: one client without a key could block the
proxy until the controller considers it dead. h11 refuses more than 16 KiB of an incomplete head, and `BoundedHeads`
of a complete one, trailers included.
- Time of heads: uvicorn waits without limit for the rest of a head. `BoundedProtocol` closes the connection after 10 s.
A request may be answered before its body ends; then the rest of the body and the next head have 10 s together, so that
the client can finish sending and read the answer. Otherwise a connection may be idle after an answer as long as Serve's
`keep_alive_timeout_s` allows.
- Connections per address: each is an open file, and a process has a limited number of files. If an address has too
many, its connection that has waited longest for a head is closed, so that slow clients cannot block others of the same
address. If all of them have requests in progress, the new one is refused. A connection counts until its file is closed.
- Unread answers: asyncio keeps a closed connection open until its client has read everything. `BoundedProtocol` aborts
a connection whose client reads nothing of an unsent answer for 60 s.
- Traces: Serve lets the client's `traceparent` header decide whether a request is traced, before any key is checked.
The header is removed, and the server's sampling ratio decides.
- Ids: Serve keeps any `x-request-id` of a client and adds it to the answer. One that is not short and plain is removed,
so that the request gets one id everywhere.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.h11_impl import H11Protocol

from deployments.addresses import parse_address
from deployments.calls.proxy_limits import ProxyLimits

logger = logging.getLogger(__name__)

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # read by every proxy process as it starts
CALLBACK = "deployments.calls.h11_proxy:bound_headers"
ID_HEADER = "x-request-id"
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACE_HEADERS = (b"traceparent", b"tracestate")
_PREFIX_V6 = 64  # the smallest network of one customer
_LATE = "the head of the request did not arrive in time"
_MAX_HEAD_BYTES = 16 * 1024
_NOT_READ = "the request is not valid HTTP, or its head has more than 16 KiB"
_TOO_MANY = "this address has too many open connections"


def bound_headers() -> list[Middleware]:
    """Make uvicorn use `BoundedProtocol` in this process, and return the middleware for Serve's proxy.

    Raises: ImportError if uvicorn would use another protocol, which has no limits.
    """
    limits = ProxyLimits.from_environment(os.environ)
    protocol = protocol_within(limits)
    # uvicorn accepts a class although it documents an import path.
    HTTP_PROTOCOLS["auto"] = cast(Any, protocol)
    _require_protocol(protocol)
    return [Middleware(TrustedHeaders, limits=limits)]


def warn_if_unbounded(environment: Mapping[str, str]) -> None:
    """Log a warning if the proxy of this node, which has the same variables, does not call `bound_headers`."""
    if environment.get(CALLBACK_VARIABLE) != CALLBACK:
        logger.warning(
            "Serve's proxy limits no connections on this node: set %s=%s for `ray start` on every node, and restart it",
            CALLBACK_VARIABLE,
            CALLBACK,
        )


def _require_protocol(protocol: type[BoundedProtocol]) -> None:
    """Raise ImportError unless a server that is configured as Serve's proxy uses this protocol."""
    config = uvicorn.Config(Response(), log_config=None)
    config.load()
    if config.http_protocol_class is not protocol:
        raise ImportError(
            f"uvicorn {uvicorn.__version__} parses requests by {config.http_protocol_class.__name__}, without this "
            "server's limits on connections: install the version that pyproject.toml names"
        )


class TrustedHeaders:
    """ASGI middleware: remove ids that are not plain, and the headers by which a client decides what is traced."""

    def __init__(self, app: ASGIApp, limits: ProxyLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope = {**scope, "headers": [header for header in scope["headers"] if self._is_kept(*header)]}
        await self._app(scope, receive, send)

    def _is_kept(self, name: bytes, value: bytes) -> bool:
        name = name.lower()
        if name == ID_HEADER.encode():
            return is_plain_id(value.decode("latin-1"))
        return self._limits.trusts_traceparent or name not in _TRACE_HEADERS


def is_plain_id(given: str) -> bool:
    """Return whether a client's id is kept: it becomes part of the answer's id and of a log line."""
    return _PLAIN_ID.fullmatch(given) is not None


class AddressBook:
    """The open connections of each address. Those that wait for a head are ordered by the start of the wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: dict[str, int] = {}
        self._waiting: dict[str, dict[BoundedProtocol, None]] = {}

    def enter(self, address: str) -> bool:
        """Count a new connection. Return False if there are too many and none can be closed for it."""
        if self._counts.get(address, 0) >= self._limit:
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
        """Record that this connection waits for a head."""
        self._waiting.setdefault(address, {})[connection] = None

    def waits_no_more(self, address: str, connection: BoundedProtocol) -> None:
        waiting = self._waiting.get(address, {})
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(address, None)

    @property
    def num_connections(self) -> int:
        return sum(self._counts.values())


class BoundedHeads(h11.Connection):
    """h11's connection with the limit on heads and trailers that arrive at once too: h11 checks incomplete ones."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event. Raises: RemoteProtocolError if it is not valid, or too large."""
        event = super().next_event()
        if isinstance(event, h11.Request | h11.EndOfMessage) and _count_bytes(event) > _MAX_HEAD_BYTES:
            raise h11.RemoteProtocolError(_NOT_READ)
        return event


def _count_bytes(event: h11.Request | h11.EndOfMessage) -> int:
    """Return the size of a request's address and headers, or of its trailers, as a client sends them."""
    address = len(event.target) if isinstance(event, h11.Request) else 0
    return address + sum(len(name) + len(value) + len(": \r\n") for name, value in event.headers)


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol over h11, with a deadline for heads and a limit on the connections of one address."""

    limits: ProxyLimits
    book: AddressBook
    _address: str | None = None  # None: the connection is not counted
    _deadline: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None  # runs while part of an answer is unsent
    _has_begun = False  # whether part of the next head has arrived

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = BoundedHeads()
        address = make_counting_key(self.client)
        if not self.book.enter(address):
            self._refuse("429 Too Many Requests", "rate_limit_error", "rate_limit_exceeded", _TOO_MANY)
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

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP or too large. An answer that has begun takes no second one: it is cut off."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse("400 Bad Request", "invalid_request_error", "http_error", _NOT_READ)
        else:
            self.transport.close()
            self._await_reading()

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
        """Stop tracking the connection, because another protocol takes over. The application has no websockets."""
        self._forget()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def start_timer(self, seconds: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        """Call `act` after these seconds, unless the handle is cancelled. Tests let the time pass themselves."""
        return self.loop.call_later(seconds, act)

    def give_way(self) -> None:
        """Abort this connection, which waits for a head, in favour of a newer one of the same address.

        Do not wait for its client to read: the file must be free for the newer connection.
        """
        self._head_is_here()
        self.transport.abort()

    @property
    def _waits_for_head(self) -> bool:
        """Return whether no request is in progress. The body of an early answered request may still be arriving."""
        is_answered_early = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        return is_answered_early or self.conn.their_state is h11.IDLE

    def _await_head(self, *, with_deadline: bool) -> None:
        """Start the deadline of a head, if there is one. Part of a head does not restart it."""
        if self._address is None:
            return
        self.book.waits(self._address, self)
        if with_deadline and self._deadline is None:
            self._deadline = self.start_timer(self.limits.head_timeout_s, self._head_is_late)

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
        elif has_begun:
            self._refuse("408 Request Timeout", "invalid_request_error", "request_too_slow", _LATE)
        else:
            self.transport.close()

    def _await_reading(self) -> None:
        """Start the deadline by which the client must read part of the unsent answer, if there is one."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._reading is None:
            self._reading = self.start_timer(self.limits.unread_timeout_s, partial(self._check_reading, unsent))

    def _check_reading(self, unsent: int) -> None:
        self._reading = None
        if self.transport.get_write_buffer_size() == unsent:
            self.transport.abort()
        else:
            self._await_reading()

    def _forget(self) -> None:
        """Stop every timer, and stop counting the connection."""
        self._head_is_here()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if self._address is not None:
            self.book.leave(self._address)
            self._address = None

    def _refuse(self, status: str, type_: str, code: str, message: str) -> None:
        """Send an error in the API's format, past h11, which may allow none, and close the connection."""
        body = f'{{"error":{{"message":"{message}","type":"{type_}","param":null,"code":"{code}"}}}}'
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head += f"{ID_HEADER}: {uuid.uuid4().hex}\r\n"
        if status.startswith("429"):
            head += "retry-after: 1\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()
        self._await_reading()


def protocol_within(given: ProxyLimits) -> type[BoundedProtocol]:
    """Return the protocol with these limits. Its connections share one address book."""

    class LimitedProtocol(BoundedProtocol):
        limits = given
        book = AddressBook(given.connections_per_address)

    return LimitedProtocol


def make_counting_key(client: tuple[str, int] | None) -> str:
    """Return the key for counting connections: the IPv4 address, or the IPv6 network of one customer."""
    if client is None:
        return ""  # a Unix socket
    address = parse_address(client[0].partition("%")[0])
    if address is None:
        return client[0]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((address, _PREFIX_V6), strict=False))
