"""Parse JSON bodies within a bound on their size in memory.

A body of 4 MiB holds up to two million values. Parsing them takes hundreds of megabytes and many seconds, and so does
reporting an error for each. The largest request that the API accepts has far fewer values, so they are counted in the
text before it is parsed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from fastapi import Request

from deployments.errors import RequestInvalid

MAX_JSON_VALUES = 16_384
KEEP_OF_BODY = "keep_of_body"  # in a scope's state: a function that takes how many bytes of the body are still held
_MAX_QUOTES = 4 * MAX_JSON_VALUES  # two for each value and for each key


def read_json(body: bytes) -> Any:
    """Return the value that `body` holds.

    Raises: RequestInvalid if it is not JSON, has more than MAX_JSON_VALUES values and keys, or is nested too deeply.
    """
    try:
        text = body.decode(json.detect_encoding(body))
        if _num_values(text) > MAX_JSON_VALUES:
            raise RequestInvalid(f"the body holds more than {MAX_JSON_VALUES} JSON values; send fewer items")
        return json.loads(text)
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno} column {exc.colno}"
        raise RequestInvalid(f"the body is not valid JSON: {exc.msg} at {where}") from exc
    except UnicodeDecodeError as exc:
        raise RequestInvalid(f"the body is not {exc.encoding} text: byte {exc.start} cannot be decoded") from exc
    except ValueError as exc:  # an integer with more digits than Python converts
        raise RequestInvalid(f"the body holds a number that cannot be read: {exc}") from exc
    except RecursionError as exc:
        raise RequestInvalid("the body is nested too deeply") from exc


def _num_values(text: str) -> int:
    """Count the marks that may begin a value or a pair. Leave out marks inside strings where that can matter.

    Use only methods of str, and stop at the bound: a body of 4 MiB must not hold the event loop.
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


def _text_bytes(value: Any) -> int:
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
    """A request whose `json` stays within the bounds. `refusal` keeps why it did not: FastAPI hides the reason.

    The raw body is dropped once it is parsed: only its texts take memory until the answer ends.
    """

    refusal: RequestInvalid | None = None
    _raw = b""

    async def body(self) -> bytes:
        """Return b"" without a body, else a mark in its place: FastAPI keeps what it gets here until the answer."""
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
