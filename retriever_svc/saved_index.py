"""Trained lists kept beside the catalogue, so that a new replica need not train them."""

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
_ABANDONED = timedelta(hours=1)  # no save takes so long: the replica was killed
_NUM_KEPT = 2
_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("tenant", "name", "digest")])


@dataclass(frozen=True, slots=True)
class SavedLists:
    """Lists as of `generation`; `refs` name the version at each slot."""

    generation: int
    encoder: str
    refs: tuple[AdapterRef, ...]
    data: NDArray[np.uint8]  # for InvertedLists.from_bytes

    def restored(self, positions: Sequence[int]) -> InvertedLists:
        """The lists, with each slot's position, -1 for what is gone."""
        return InvertedLists.from_bytes(self.data, np.asarray(positions, np.int64))


class SavedIndexes:
    """The files of one place, each named by its generation and digest: replicas that save at once write two files.

    Raises: StoreUnavailable.
    """

    def __init__(self, files: Files, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._files, self._now = files, now

    def newest(self, encoder: str) -> SavedLists | None:
        """The newest lists over vectors of this encoder whose file is whole."""
        for name in self._names():
            saved = self._read(name)
            if saved is not None and saved.encoder == encoder:
                return saved
        return None

    def save(self, saved: SavedLists) -> None:
        """Write the file, and remove all but the newest."""
        data = _to_bytes(saved)
        self._files.write(f"{saved.generation:020d}-{hashlib.sha256(data).hexdigest()}.lists-v1", data)
        self._tidy()

    def _tidy(self) -> None:
        half_written = [file for file in self._files.entries() if _HALF_WRITTEN.fullmatch(file.name)]
        abandoned = [file.name for file in half_written if file.written_at < self._now() - _ABANDONED]
        self._files.delete([*self._names()[_NUM_KEPT:], *abandoned])

    def _names(self) -> list[str]:
        """Newest first."""
        return sorted((file.name for file in self._files.entries() if _NAME.fullmatch(file.name)), reverse=True)

    def _read(self, name: str) -> SavedLists | None:
        """None for a file that was removed meanwhile, or is damaged: FAISS would crash on what is not whole."""
        data = self._files.read(name)
        if data is None:
            return None
        if hashlib.sha256(data).hexdigest() not in name:
            logger.warning("the saved index %s is damaged and is passed over", name)
            return None
        return _from_bytes(data)


def _to_bytes(saved: SavedLists) -> bytes:
    """An Arrow stream of the refs, then the lists as FAISS writes them."""
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
