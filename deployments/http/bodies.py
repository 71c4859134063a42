"""Read request bodies within bounds on their size, duration and memory, and parse JSON within a bound on its values.

A JSON body of 4 MiB holds up to two million values. Parsing them takes hundreds of megabytes and many seconds, and so
does reporting an error for each. The largest request that the API accepts has far fewer values, so they are counted in
the text before it is parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.background import limit_time
from deployments.byte_budget import ByteBudget
from deployments.config.app import FORM_OVERHEAD_BYTES
from deployments.errors import BodyMemoryFull, BodyNotAllowed, BodyTooLarge, BodyTooSlow, RequestInvalid
from deployments.http.error_responses import error_response
from deployments.http.scope import find_context, find_path

DEFAULT_MAX_BODY_BYTES = 4 << 20
MAX_BODY_TOTAL_BYTES = 256 << 20  # all bodies of one Ingress replica, except uploads
_PATIENCE_S = 30.0
_SLOWEST_BYTES_PER_S = 1 << 20
_UPLOADS = "/v1/loras"
FORM = "multipart/form-data"
_WITH_BODY = ("POST", "PUT", "PATCH")
Refusal = BodyMemoryFull | BodyTooLarge | BodyTooSlow
MAX_JSON_VALUES = 16_384
KEEP_OF_BODY = "keep_of_body"  # in a scope's state: a function that sets how many bytes of the body are still held
_MAX_QUOTES = 4 * MAX_JSON_VALUES  # two for each value and for each key


class BodyLimit:
    """ASGI middleware: bound the size, the duration and the memory of request bodies.

    - 413: the body is larger than `limit_of` allows for this request.
    - 408: the body is incomplete after `patience_s` plus one second for each MiB it may have. A slow body would
      otherwise hold its place forever.
    - 503: the budget has no room. A body counts there until it is parsed; its parsed texts count until the answer ends.
      Uploads may be larger than other bodies; `count_upload` counts them.
    - 400: the method takes no body. No route would read it, and Serve's proxy and the replica would keep all of it in
      memory until the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit_of: Callable[[Scope], int],
        budget: ByteBudget,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._app, self._limit_of, self._budget, self._patience_s = app, limit_of, budget, patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope.get("method", "POST") not in _WITH_BODY and _announces_body(scope):
            refusal = BodyNotAllowed(f"{scope['method']} takes no body: send it without one")
            await error_response(refusal)(scope, receive, send)
            return
        max_bytes = self._limit_of(scope)
        budget = self._budget if max_bytes <= DEFAULT_MAX_BODY_BYTES else None
        body = _Body(receive, max_bytes, budget, find_context(scope).tenant, self._patience_s)
        scope.setdefault("state", {})[KEEP_OF_BODY] = body.keep
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if started or body.refusal is None:  # FastAPI answers 400 to any error during its reading
                started = True
                await send(message)

        try:
            with contextlib.suppress(BodyMemoryFull, BodyTooLarge, BodyTooSlow):
                await self._app(scope, body.read, answer)
        finally:
            body.keep(0)
        if body.refusal is not None and not started:
            await error_response(body.refusal)(scope, receive, send)


def _announces_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or any(length.strip() != "0" for length in headers.getlist("content-length"))


class _Body:
    """Reads the messages of one request, as long as its body stays within the bounds."""

    def __init__(
        self, receive: Receive, max_bytes: int, budget: ByteBudget | None, tenant: str, patience_s: float
    ) -> None:
        self._receive, self._max_bytes, self._budget, self._tenant = receive, max_bytes, budget, tenant
        self._seconds = patience_s + max_bytes / _SLOWEST_BYTES_PER_S
        self._until: float | None = asyncio.get_running_loop().time() + self._seconds  # None: the body is complete
        self._seen = self._held = 0
        self.refusal: Refusal | None = None

    async def read(self) -> Message:
        """Return the next message. Raises: BodyMemoryFull, BodyTooLarge, BodyTooSlow."""
        async with limit_time(asyncio.timeout_at(self._until), self._refuse_slow):
            message = await self._receive()
        num_bytes = len(message.get("body", b""))
        self._seen += num_bytes
        if self._seen > self._max_bytes:
            raise self._refuse(BodyTooLarge(f"the body is larger than {self._max_bytes} bytes"))
        if self._budget is not None and not self._budget.take(self._tenant, num_bytes):
            raise self._refuse(BodyMemoryFull(self._budget.max_bytes))
        self._held += num_bytes
        if not message.get("more_body", False):
            self._until = None  # the next message says that the client disconnected
        return message

    def keep(self, num_bytes: int) -> None:
        """Release all held bytes except `num_bytes`."""
        num_bytes = min(num_bytes, self._held)
        if self._budget is not None:
            self._budget.give(self._tenant, self._held - num_bytes)
        self._held = num_bytes

    def _refuse_slow(self) -> Refusal:
        return self._refuse(BodyTooSlow(f"the body did not arrive within {self._seconds:.0f} s"))

    def _refuse(self, refusal: Refusal) -> Refusal:
        self.refusal = refusal
        return refusal


def max_body_bytes(max_upload_bytes: int, scope: Scope) -> int:
    """Return the size limit of this request's body: that of an upload, or a small one for all other bodies."""
    if content_kind(scope) == FORM and scope["method"] == "POST" and find_path(scope) == _UPLOADS:
        return max_upload_bytes + FORM_OVERHEAD_BYTES
    return DEFAULT_MAX_BODY_BYTES


def content_kind(scope: Scope) -> str:
    """Return the kind of the body: its first content-type, without parameters, in small letters."""
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()


def read_json(body: bytes) -> Any:
    """Return the value that `body` holds.

    Raises: RequestInvalid if it is not JSON, has more than MAX_JSON_VALUES values and keys, or is nested too deeply.
    """
    try:
        text = body.decode(json.detect_encoding(body))
        if _num_values(text) > MAX_JSON_VALUES:
            raise RequestInvalid(f"the body has more than {MAX_JSON_VALUES} JSON values; send fewer items")
        return json.loads(text)
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno} column {exc.colno}"
        raise RequestInvalid(f"the body is not valid JSON: {exc.msg} at {where}") from exc
    except UnicodeDecodeError as exc:
        raise RequestInvalid(f"the body is not {exc.encoding} text: byte {exc.start} cannot be decoded") from exc
    except ValueError as exc:  # an integer with more digits than Python converts
        raise RequestInvalid(f"the body has a number that cannot be read: {exc}") from exc
    except RecursionError as exc:
        raise RequestInvalid("the body is nested too deeply") from exc


def _num_values(text: str) -> int:
    """Count the marks that may begin a value or a pair. Ignore marks inside strings if that could matter.

    Use only methods of str, and stop at the bound: a body of 4 MiB must not block the event loop.
    """
    num_marks = _num_marks(text)
    if num_marks <= MAX_JSON_VALUES:
        return num_marks
    without_escapes = text.replace("\\\\", "").replace('\\"', "")
    parts = without_escapes.split('"', _MAX_QUOTES + 1)  # outside, inside, outside ...
    if len(parts) > _MAX_QUOTES + 1:
        return MAX_JSON_VALUES + 1
    return _num_marks("".join(parts[::2]))


def _num_marks(text: str) -> int:
    return 1 + text.count(",") + text.count("[") + text.count("{")


def _text_bytes(value: object) -> int:
    """Return how much memory the texts of a parsed value take. The number of its values has a bound of its own."""
    num_bytes, waiting = 0, [value]
    while waiting:
        match waiting.pop():
            case str() as text:
                num_bytes += sys.getsizeof(text)
            case list() as items:
                waiting += items
            case dict() as pairs:
                waiting += pairs.keys()
                waiting += pairs.values()
    return num_bytes


class BoundedRequest(Request):
    """A request whose `json` stays within the bounds. `refusal` keeps the error, which FastAPI would hide.

    The raw body is dropped once it is parsed, so only its texts take memory until the answer ends.
    """

    refusal: RequestInvalid | None = None
    _raw = b""

    async def body(self) -> bytes:
        """Return b"" without a body, otherwise a placeholder: FastAPI keeps this value until the answer."""
        if not hasattr(self, "_body"):
            self._raw = await super().body()
            self._body = b"body" if self._raw else b""
        return self._body

    async def json(self) -> Any:
        """Return the body's value. Raises: RequestInvalid."""
        if not hasattr(self, "_json"):
            await self.body()
            try:
                self._json = read_json(self._raw)
            except RequestInvalid as exc:
                self.refusal = exc
                raise
            self._raw = b""
            if (keep := self.scope.get("state", {}).get(KEEP_OF_BODY)) is not None:
                keep(_text_bytes(self._json))
        return self._json


class AnsweringRoute(APIRoute):
    """A route that turns its errors into responses.

    Errors that leave the route would be raised again by Starlette and logged by Serve as crashes, and Serve 2.60
    answers its own BackPressureError and DeploymentUnavailableError in plain text.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[object, object, Response]]:
        handle = super().get_route_handler()

        async def answering(request: Request) -> Response:
            bounded = BoundedRequest(request.scope, request.receive)
            try:
                return await handle(bounded)
            except (RequestValidationError, HTTPException):
                if bounded.refusal is not None:
                    return error_response(bounded.refusal)
                raise
            except Exception as exc:
                return error_response(exc)

        return answering
