"""Read multipart uploads: the files and the description of an adapter, within a byte budget for all uploads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import numpy as np
from fastapi import Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.types import Message

from deployments.api import error_table
from deployments.api.adapters import MAX_UPLOAD_FILES, AdapterLabel, PublishItem, SentFile
from deployments.background import limit_time
from deployments.byte_budget import ByteBudget
from deployments.calls.catalogue_clients import Buffer
from deployments.errors import BodyTooSlow, RequestInvalid, UploadMemoryFull
from deployments.publishing.source_folders import disk_full_reported, file_problems
from lora_store import AdapterRefused
from lora_store.contract_files import MAX_CONTRACT_BYTES
from lora_store.uploads import PART_BYTES

_MAX_DIGITS = 18
# An upload reserves all bytes that it announces, so a stalled one must end soon. 64 KiB/s on average is less than a
# slow line sends, and a window of ten seconds tolerates a pause.
_WINDOW_S = 10.0
_BYTES_PER_WINDOW = 640 << 10
_MAX_FIELDS = 41  # name, template, contract, samples, visibility, ttl_s, share, shadow, base_model and at most 32 tags
_MAX_FIELD_BYTES = 2 * MAX_CONTRACT_BYTES  # with the spaces of its JSON
_FILES = "files"
_LISTS = ("tags", "samples")  # an empty value is an empty list
_WHOLE_BYTES = 1 << 20  # a larger file is sent to the Store in parts
SendPart = Callable[[str, int, Buffer], Awaitable[None]]
"""Send one part of a file to the Store: its id, its number from 0, and its bytes."""


@contextmanager
def count_upload(http: Request, tenant: str, budget: ByteBudget, *, window_s: float = _WINDOW_S) -> Iterator[Request]:
    """Yield the request, and count its bytes from the first one until the block ends, when it is published or refused.

    The announced length is taken at once: an upload without room is refused before it is read. `window_s`: the longest
    time for 640 KiB of it. Raises while it is read: UploadMemoryFull, BodyTooSlow.
    """
    taken, seen = 0, 0
    pace = _Pace(window_s)

    def take(num_bytes: int) -> None:
        nonlocal taken
        if not budget.take(tenant, num_bytes - taken):
            raise UploadMemoryFull(budget.max_bytes)
        taken = num_bytes

    async def receive() -> Message:
        nonlocal seen
        message = await pace.receive(http)
        seen += len(message.get("body", b""))
        take(max(taken, seen))
        return message

    try:
        take(_announced(http))
        with disk_full_reported():
            yield Request(http.scope, receive)
    finally:
        budget.give(tenant, taken)


class _Pace:
    """Refuses an upload that sends less than `_BYTES_PER_WINDOW` within `window_s`."""

    def __init__(self, window_s: float) -> None:
        self._window_s, self._num_bytes = window_s, 0
        self._until: float | None = None  # of the event loop's clock, from the first read

    async def receive(self, http: Request) -> Message:
        """Return the next message. Raises: BodyTooSlow."""
        clock = asyncio.get_running_loop().time
        if self._until is None:
            self._until = clock() + self._window_s
        async with limit_time(asyncio.timeout_at(self._until), self._too_slow):
            message = await http.receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes >= _BYTES_PER_WINDOW:
            self._num_bytes, self._until = 0, clock() + self._window_s
        return message

    def _too_slow(self) -> BodyTooSlow:
        least = f"{_BYTES_PER_WINDOW >> 10} KiB in {self._window_s:g} s"
        return BodyTooSlow(f"the upload sent less than {least}; send it faster")


def _announced(http: Request) -> int:
    """Return the announced length; 0 for a chunked body (no Content-Length)."""
    length = http.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) <= _MAX_DIGITS else 0


async def read_upload(http: Request, send: SendPart, sent: list[str]) -> PublishItem:
    """Return the upload. Files are spooled to disk on arrival; large ones are then sent in parts, never read whole.

    The ids of files that were sent are added to `sent`, also if reading fails later.
    Raises: RequestInvalid, AdapterRefused, StoreUnavailable.
    """
    _check_charset(http)
    form = http.form(max_files=MAX_UPLOAD_FILES, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
    async with form as parts:
        files: list[UploadFile] = []
        fields: dict[str, list[str]] = {}
        for key, value in parts.multi_items():
            if isinstance(value, UploadFile) and key == _FILES:
                files.append(value)
            elif isinstance(value, UploadFile) or key == _FILES:
                raise RequestInvalid(f"{key[:100]}: files come in parts named {_FILES!r} that have a file name", key)
            else:
                fields.setdefault(key, []).append(value)
        label = _read_label(fields)
        names = [file.filename or "" for file in files]
        if problems := list(file_problems(names)):
            raise AdapterRefused(label.name or "", problems)
        contents = {name: await _read_file(file, send, sent) for name, file in zip(names, files, strict=True)}
    return label.item(files=contents)


def _check_charset(http: Request) -> None:
    """Refuse a charset other than UTF-8: Starlette decodes with the named codec, and punycode takes quadratic time.

    The header is parsed as Starlette parses it. Raises: RequestInvalid.
    """
    _, parameters = parse_options_header(http.headers.get("content-type"))
    charset = parameters.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise RequestInvalid(f"content-type: the charset of an upload must be utf-8, got {charset[:100]!r}")


async def _read_file(file: UploadFile, send: SendPart, sent: list[str]) -> bytes | SentFile:
    if (file.size or 0) < _WHOLE_BYTES:
        return await file.read()
    id, number, num_bytes = uuid4().hex, 0, 0
    sent.append(id)
    while part := await file.read(PART_BYTES):
        await send(id, number, np.frombuffer(part, np.uint8))
        number, num_bytes = number + 1, num_bytes + len(part)
    return SentFile(id, num_bytes)


def _read_label(fields: dict[str, list[str]]) -> AdapterLabel:
    """Return the description. Raises: RequestInvalid for an unknown field, a repeated field, or a missing name."""
    for key, values in fields.items():
        if len(values) > 1 and key != "tags":
            raise RequestInvalid(f"{key[:100]}: is given {len(values)} times", key)
    single = {key: values[0] for key, values in fields.items() if key != "tags"}
    lists = {key: [value for value in fields[key] if value] for key in _LISTS if key in fields}
    try:
        label = AdapterLabel.model_validate(single | lists)
    except ValidationError as exc:
        raise error_table.validation_error(exc) from exc
    if label.name is None:
        raise RequestInvalid("name: uploaded files need one", "name")
    return label
