"""Find the calls in an answer while it is generated.

Text between calls is content, as is a malformed call: one that is not a JSON object, has numbers that no double holds,
names an unknown function, or is incomplete. White space around calls is dropped.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection

from gpu_worker.front.request.request import FinishReason
from gpu_worker.front.request.tools import ToolCallPiece, ToolForm

_MAX_LEAD = 192  # characters between a marker and the object
MAX_MALFORMED = 8  # in one answer: each is searched again for others, so their number is bounded
_HEADER = re.compile(r'\{\s*"name"\s*:\s*"(?P<name>[A-Za-z0-9_.-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def new_call_id() -> str:
    """Return a new id of a call."""
    return f"call_{secrets.token_hex(12)}"


class ObjectEnd:
    """Find the end of the JSON object that begins at `start` of a growing text. Each character is read once."""

    _OUTSIDE, _INSIDE = re.compile(r'["{}]'), re.compile(r'["\\]')

    def __init__(self, start: int) -> None:
        self._at, self._depth, self._in_string, self._end = start, 0, False, -1

    def find(self, text: str) -> int:
        """Return the place after the object's last brace, -1 while there is none."""
        while self._end < 0:
            found = (self._INSIDE if self._in_string else self._OUTSIDE).search(text, self._at)
            if found is None:
                self._at = max(self._at, len(text))
                break
            self._at = found.end()
            self._read(found[0])
        return self._end

    def _read(self, character: str) -> None:
        if character == '"':
            self._in_string = not self._in_string
        elif character == "\\":
            self._at += 1
        else:
            self._depth += 1 if character == "{" else -1
            if self._depth == 0:
                self._end = self._at


class ToolCallParser:
    """Separates one answer into content and calls of the functions `names`.

    `is_constrained`: the answer follows a grammar for calls, so arguments are released as they arrive; otherwise each
    call is released when it is complete. `max_calls`: the answer ends after so many calls.
    """

    def __init__(
        self,
        form: ToolForm,
        names: Collection[str],
        *,
        is_constrained: bool = False,
        max_calls: int | None = None,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._form, self._names, self._new_id = form, names, new_id
        self._is_constrained, self._max_calls = is_constrained, max_calls
        self._raw = ""  # text that is neither content nor part of a call yet
        self._step: Callable[[bool], bool] = self._search
        self._is_start, self._num_malformed = True, 0
        self._resume = 0  # where the search goes on if the call turns out to be malformed
        self._name: str | None = None  # the function, where the form names it before the object
        self._object, self._object_at = ObjectEnd(0), 0
        self._arguments: ObjectEnd | None = None  # while a call's first piece is released
        self._num_sent = 0
        self.num_calls = 0  # complete ones
        self.content_at = 0  # the place in the answer where the content that was released last begins
        self._num_read = 0
        self._content: list[str] = []
        self._pieces: list[ToolCallPiece] = []

    @property
    def num_settled(self) -> int:
        """The number of characters that are known to be content, or a call, or the space around one."""
        return self._num_read - len(self._raw)

    @property
    def is_done(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def read(
        self, text: str, reason: FinishReason | None
    ) -> tuple[str, tuple[ToolCallPiece, ...], FinishReason | None]:
        """Return what new text releases.

        `reason`: why it ends with this text, None if it does not.
        """
        self._raw += text
        self._num_read += len(text)
        is_last = reason is not None
        while self._step(is_last):
            pass
        if self.is_done:
            reason = "stop"
        if reason == "stop" and self.num_calls and self._arguments is None:
            reason = "tool_calls"
        content, pieces = "".join(self._content), tuple(self._pieces)
        self._content, self._pieces = [], []
        return content, pieces, reason

    def _search(self, is_last: bool) -> bool:
        """Release content up to a marker. Return whether there is one; so do the other steps."""
        raw = self._raw
        if self.is_done:
            self._raw = ""
            return False
        if self._num_malformed == MAX_MALFORMED:
            self._release(len(raw))
            return False
        if self._form.is_bare and self._is_start:
            begun = raw.lstrip()
            if not begun and not is_last:
                return False
            if begun.startswith("{"):
                place = len(raw) - len(begun)
                self._resume = place + 1
                return self._open(place, None)
        place = raw.find(self._form.marker)
        if place < 0:
            self._release_content(is_last)
            return False
        self._release(len(raw[:place].rstrip()))
        self._resume = len(self._raw) - len(raw) + place + len(self._form.marker)
        self._step = self._lead
        return True

    def _release_content(self, is_last: bool) -> None:
        """Release the text without a marker, except for a part that may belong to one."""
        raw = self._raw
        if is_last:
            self._release(len(raw.rstrip()) if self.num_calls else len(raw))
            self._raw = ""
            return
        marker = self._form.marker
        held = next((n for n in range(min(len(marker) - 1, len(raw)), 0, -1) if raw.endswith(marker[:n])), 0)
        self._release(len(raw[: len(raw) - held].rstrip()))

    def _lead(self, is_last: bool) -> bool:
        """Read up to the object."""
        brace = self._raw.find("{", self._resume)
        if brace < 0 and not is_last and len(self._raw) - self._resume <= _MAX_LEAD:
            return False
        is_near = 0 <= brace - self._resume <= _MAX_LEAD
        lead = self._form.lead.fullmatch(self._raw, self._resume, brace) if is_near else None
        if lead is None:
            return self._give_up()
        return self._open(brace, lead.groupdict().get("name"))

    def _open(self, place: int, name: str | None) -> bool:
        self._object, self._object_at, self._name = ObjectEnd(place), place, name
        self._step = self._read_object
        return True

    def _read_object(self, is_last: bool) -> bool:
        """Read the object, and release its call."""
        end = self._object.find(self._raw)
        if self._is_constrained:
            self._stream_arguments()
        if end < 0 and self._arguments is not None:
            self._raw = "" if is_last else self._raw
            return False
        if end < 0:
            return is_last and self._give_up()
        if self._arguments is None and not self._release_call(self._raw[self._object_at : end]):
            return self._give_up()
        self._arguments = None
        self.num_calls += 1
        self._is_start = False
        self._raw = self._raw[end:]
        self._step = self._after
        return True

    def _after(self, is_last: bool) -> bool:
        """Read what follows an object: a separator, or the end of the calls."""
        form, begun = self._form, self._raw.lstrip()
        if self.is_done:
            self._step = self._search
            return True
        for text in filter(None, (form.more, form.end)):
            if begun.startswith(text):
                self._resume = len(self._raw) - len(begun) + len(text)
                self._step = self._lead
                if text == form.end:
                    self._raw, self._step = self._raw[self._resume :], self._search
                return True
            if text.startswith(begun) and not is_last:
                return False
        self._step = self._search
        return True

    def _stream_arguments(self) -> None:
        """Release the part of the arguments that has arrived, after the function's name."""
        if self._arguments is None:
            header = None if self._name is not None else _HEADER.match(self._raw, self._object_at)
            name = self._name if header is None else header["name"]
            if name is None or name not in self._names:
                return
            self._num_sent = self._object_at if header is None else header.end()
            self._arguments = ObjectEnd(self._num_sent)
            self._pieces.append(ToolCallPiece(self.num_calls, "", self._new_id(), name))
        end = self._arguments.find(self._raw)
        arrived = self._raw[self._num_sent : len(self._raw) if end < 0 else end]
        if arrived:
            self._num_sent += len(arrived)
            self._pieces.append(ToolCallPiece(self.num_calls, arrived))

    def _release_call(self, text: str) -> bool:
        """Release the call that the object `text` makes. Return whether it makes one."""
        value = _loaded(text)
        if value is None:
            return False
        name = value.get("name") if self._name is None else self._name
        arguments = value if self._name is not None else value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # some models write the object as a JSON string
            arguments = _loaded(arguments)
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return False
        try:
            written = _dumped(arguments)
        except (ValueError, RecursionError):
            return False
        self._pieces.append(ToolCallPiece(self.num_calls, "", self._new_id(), name))
        self._pieces.append(ToolCallPiece(self.num_calls, written))
        return True

    def _give_up(self) -> bool:
        """Make a malformed call content, and search the text inside it."""
        self._num_malformed += 1
        self._release(self._resume)
        self._step = self._search
        return True

    def _release(self, count: int) -> None:
        released, self._raw = self._raw[:count], self._raw[count:]
        if released:
            self._is_start = False
            if not self._content:
                self.content_at = self.num_settled - len(released)
            self._content.append(released)


def _loaded(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text, strict=False, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _dumped(arguments: dict[str, object]) -> str:
    """Return JSON text, without characters that UTF-8 lacks.

    Raises: ValueError for a number that no double holds; RecursionError for objects nested too deeply.
    """
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    has_surrogate = not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
    return json.dumps(arguments) if has_surrogate else text
