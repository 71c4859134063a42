"""One budget over all uploads that an Ingress replica holds at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from starlette.types import Message

from deployments.errors import UploadsBusy

_MAX_DIGITS = 18


class UploadBudget:
    """Bytes of uploads in memory, each from its first byte until it is published or refused.

    What a request announces is taken at once: an upload that cannot be held is refused before it is read.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def reading(self, http: Request) -> Iterator[Request]:
        """The request, its body counted until the block ends. Raises: UploadsBusy, also as the body is read."""
        taken, seen = 0, 0

        def take(num_bytes: int) -> None:
            nonlocal taken
            if self.num_bytes + num_bytes - taken > self._max_bytes:
                raise UploadsBusy(self._max_bytes)
            self.num_bytes += num_bytes - taken
            taken = num_bytes

        async def receive() -> Message:
            nonlocal seen
            message = await http.receive()
            seen += len(message.get("body", b""))
            take(max(taken, seen))
            return message

        try:
            take(_announced(http))
            yield Request(http.scope, receive)
        finally:
            self.num_bytes -= taken


def _announced(http: Request) -> int:
    """0 of a body that comes in pieces of its own."""
    length = http.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) <= _MAX_DIGITS else 0
