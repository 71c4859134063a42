"""The Store deployment: the only writer of the catalogue, and the source of every blob."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_store import LOCAL_TENANT, AdapterRecord, AdapterRef, AdapterRefused, LoraStore, Staged

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class FolderUpload:
    """A PEFT folder to publish, and what its publisher says of it."""

    path: Path
    name: str | None = None
    tenant: str = LOCAL_TENANT
    tags: tuple[str, ...] = ()
    template: str | None = None


class StoreDeployment:
    """Answers writes and blobs; reads are the Retriever's. File work runs beside the event loop."""

    def __init__(self, uri: str, accepted_bases: Sequence[str]) -> None:
        self._accepted_bases = frozenset(accepted_bases)
        self._store = LoraStore(uri, accepts_base=accepted_bases)

    async def stage(self, upload: FolderUpload, module_shapes: Shapes) -> Staged:
        """The checked folder, its blobs stored. Raises: AdapterRefused, with every reason."""
        name = upload.name or upload.path.name
        if name in self._accepted_bases:
            raise AdapterRefused(name, ["the name is the base model's"])
        return await asyncio.to_thread(
            self._store.stage,
            upload.path,
            module_shapes=module_shapes,
            name=upload.name,
            tenant=upload.tenant,
            tags=upload.tags,
            template=upload.template,
        )

    async def commit(
        self,
        staged: Sequence[Staged],
        embeddings: Sequence[Sequence[float] | None],
        encoder: str,
        probe_shifts: Sequence[float],
        actor: str,
    ) -> int:
        """The generation at which all of `staged` is live. Raises: AdapterRefused, VersionConflict."""
        return await asyncio.to_thread(self._store.commit, staged, embeddings, encoder, probe_shifts, actor)

    async def fetch(self, weights_digest: str) -> NDArray[np.uint8]:
        """The weights' canonical bytes, verified; one read-only buffer that travels through Ray's object store.

        Raises: AdapterNotFound, BlobCorrupted.
        """
        return np.frombuffer(await asyncio.to_thread(self._store.load, weights_digest), dtype=np.uint8)

    async def live(self, refs: Sequence[AdapterRef]) -> dict[AdapterRef, AdapterRecord]:
        """The records of those versions that are live; embeddings stay here."""
        snapshot = await asyncio.to_thread(self._store.snapshot)
        records = [snapshot.records.get((ref.tenant, ref.name)) for ref in refs]
        return {record.ref: replace(record, embedding=None) for record in records if record and record.ref in refs}
