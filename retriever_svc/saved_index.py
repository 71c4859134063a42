"""Store trained lists next to the catalogue, so that a new replica need not train its own."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef
from lora_store.files import Files
from retriever_svc.inverted_lists import InvertedLists

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{20})-([0-9a-f]{64})\.lists-v1")
_HALF_WRITTEN = re.compile(r"\.\d{20}-.*")
_ABANDONED = timedelta(hours=1)  # longer than any save takes: the replica was killed
_NUM_KEPT = 2
_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("tenant", "name", "digest")])


@dataclass(frozen=True, slots=True)
class SavedLists:
    """Lists trained at `generation`. `refs` has the version at each slot."""

    generation: int
    encoder: str
    refs: tuple[AdapterRef, ...]
    data: NDArray[np.uint8]  # for InvertedLists.from_bytes

    def restored(self, positions: Sequence[int]) -> InvertedLists:
        """Return the lists with a position for each slot, -1 for adapters that are gone."""
        return InvertedLists.from_bytes(self.data, np.asarray(positions, np.int64))


class SavedIndexes:
    """The saved lists of one location. Files are named by generation and digest, so concurrent saves do not collide.

    Raises: StoreUnavailable.
    """

    def __init__(self, files: Files, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._files, self._now = files, now

    def newest(self, encoder: str) -> SavedLists | None:
        """Return the newest intact lists over vectors of this encoder, or None."""
        for name in self._names():
            saved = self._read(name)
            if saved is not None and saved.encoder == encoder:
                return saved
        return None

    def save(self, saved: SavedLists) -> None:
        """Write the lists and delete old files."""
        data = _to_bytes(saved)
        self._files.write(f"{saved.generation:020d}-{hashlib.sha256(data).hexdigest()}.lists-v1", data)
        self._delete_old()

    def _delete_old(self) -> None:
        half_written = [file for file in self._files.entries() if _HALF_WRITTEN.fullmatch(file.name)]
        abandoned = [file.name for file in half_written if file.written_at < self._now() - _ABANDONED]
        self._files.delete([*self._names()[_NUM_KEPT:], *abandoned])

    def _names(self) -> list[str]:
        """Return the names of the files, newest first."""
        return sorted((file.name for file in self._files.entries() if _NAME.fullmatch(file.name)), reverse=True)

    def _read(self, name: str) -> SavedLists | None:
        """Read a file. Return None if it was deleted meanwhile or is damaged: FAISS would crash on damaged bytes."""
        data = self._files.read(name)
        if data is None:
            return None
        if hashlib.sha256(data).hexdigest() not in name:
            logger.warning("ignoring the saved index %s, which is damaged", name)
            return None
        return _from_bytes(data)


def _to_bytes(saved: SavedLists) -> bytes:
    """Return an Arrow stream of the refs, followed by the lists in FAISS's format."""
    about = {b"generation": str(saved.generation).encode(), b"encoder": saved.encoder.encode()}
    schema = _SCHEMA.with_metadata(about)
    columns = [[getattr(ref, field.name) for ref in saved.refs] for field in schema]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))
    sink.write(saved.data)
    return bytes(sink.getvalue())


def _from_bytes(data: bytes) -> SavedLists:
    source = pa.BufferReader(data)
    with pa.ipc.open_stream(source) as reader:
        table = reader.read_all()
    about = table.schema.metadata
    refs = tuple(map(AdapterRef, *(column.to_pylist() for column in table.columns)))
    lists = np.frombuffer(source.read(), np.uint8)
    return SavedLists(int(about[b"generation"]), about[b"encoder"].decode(), refs, lists)
