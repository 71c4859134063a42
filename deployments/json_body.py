"""Parse JSON bodies within a bound on their size in memory.

A body of 4 MiB holds up to two million values, which take hundreds of megabytes and many seconds once each has become
an object, and again once each has become an error. The largest request that the API accepts has far fewer, so values
are counted in the text, before any of them is made.
"""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi import Request

from deployments.errors import RequestInvalid

MAX_JSON_VALUES = 16_384
# Possessive, and closed by the end of the text too: no character is looked at twice.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


def read_json(body: bytes) -> Any:
    """Return the value that `body` holds.

    Raises: RequestInvalid: it is no JSON, or holds more than MAX_JSON_VALUES values and keys, or is nested too deeply.
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
    """Count what may begin a value or a pair. Marks inside of strings are left out only where that can matter."""
    num_marks = _num_marks(text)
    return num_marks if num_marks <= MAX_JSON_VALUES else _num_marks(_STRING.sub("", text))


def _num_marks(text: str) -> int:
    return 1 + text.count(",") + text.count("[") + text.count("{")


class BoundedRequest(Request):
    """A request whose `json` stays within the bounds. `refusal` keeps why it did not: FastAPI hides the reason."""

    refusal: RequestInvalid | None = None

    async def json(self) -> Any:
        """Return the body's value. Raises: RequestInvalid."""
        try:
            return read_json(await self.body())
        except RequestInvalid as exc:
            self.refusal = exc
            raise
