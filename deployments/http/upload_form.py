"""Read a multipart upload: the files of an adapter, and the fields that describe it."""

from __future__ import annotations

import numpy as np
from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from deployments.api import error_table
from deployments.api.adapters import AdapterLabel
from deployments.api.publish_item import MAX_UPLOAD_FILES, FileBytes, PublishItem
from deployments.errors import RequestInvalid
from deployments.publishing.source_folders import file_problems
from lora_store import AdapterRefused

_MAX_FIELDS = 40  # name, template, visibility and at most 32 tags
_MAX_FIELD_BYTES = 4096
_FILES = "files"
_ARRAY_BYTES = 1 << 20


async def read_upload(http: Request) -> PublishItem:
    """Return the upload. Files are spooled to disk on arrival and read once. Raises: RequestInvalid, AdapterRefused."""
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
        label = _label_of(fields)
        names = [file.filename or "" for file in files]
        if problems := list(file_problems(names)):
            raise AdapterRefused(label.name or "", problems)
        contents = {name: _as_sent(await file.read()) for name, file in zip(names, files, strict=True)}
    return PublishItem(
        name=label.name,
        tags=tuple(label.tags),
        template=label.template,
        files=contents,
        visibility=label.visibility,
    )


def _as_sent(data: bytes) -> FileBytes:
    """Return a large file as an array over the same memory: Ray passes arrays on without a copy in the Store."""
    return data if len(data) < _ARRAY_BYTES else np.frombuffer(data, np.uint8)


def _label_of(fields: dict[str, list[str]]) -> AdapterLabel:
    """Return the description. Raises: RequestInvalid for an unknown field, a repeated field, or a missing name."""
    for key, values in fields.items():
        if len(values) > 1 and key != "tags":
            raise RequestInvalid(f"{key[:100]}: comes {len(values)} times", key)
    single = {key: values[0] for key, values in fields.items() if key != "tags"}
    try:
        label = AdapterLabel.model_validate(single | {"tags": fields.get("tags", [])})
    except ValidationError as exc:
        raise error_table.validation_error(exc) from exc
    if label.name is None:
        raise RequestInvalid("name: uploaded files need one", "name")
    return label
