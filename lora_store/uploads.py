"""Large files of uploads on their way to a stage: in parts, so that no process holds a whole one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from datetime import datetime

from lora_store.errors import StoreUnavailable
from lora_store.files import Files
from lora_store.location import Location

PART_BYTES = 8 << 20
_ID = re.compile(r"[0-9a-f]{32}")


class Uploads:
    """Files in `location`, each with the id that its sender chose. Raises: StoreUnavailable."""

    def __init__(self, location: Location) -> None:
        self._files = Files(location)

    def put(self, upload: str, number: int, data: bytes | memoryview) -> None:
        """Store a part. Parts are numbered from 0; repeating one changes nothing."""
        self._files.write_pieces(_name(upload, number), [data], durable=False)

    def parts(self, upload: str, num_bytes: int) -> Iterator[bytes]:
        """Yield the parts of a file of that size, in order. Raises: StoreUnavailable if some are missing."""
        number = num_read = 0
        while num_read < num_bytes and (part := self._files.read(_name(upload, number))) is not None:
            yield part
            number, num_read = number + 1, num_read + len(part)
        if num_read != num_bytes:
            raise StoreUnavailable(f"{num_bytes - num_read} bytes of an uploaded file are missing: send it again")

    def delete(self, uploads: Collection[str]) -> None:
        """Delete all parts of these files."""
        if uploads:
            names = [file.name for file in self._files.entries()]
            self._files.delete([name for name in names if name.partition("-")[0] in uploads])

    def delete_old(self, before: datetime) -> None:
        """Delete the parts written before that time, left behind by senders that crashed."""
        self._files.delete([file.name for file in self._files.entries() if file.written_at <= before])


def _name(upload: str, number: int) -> str:
    if not _ID.fullmatch(upload):
        raise ValueError(f"{upload[:100]!r} is not the id of an upload")
    return f"{upload}-{number:06}"  # flat: an empty folder would remain
