"""The Store deployment: the only writer of the catalogue, and the source of every blob."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_store import LOCAL_TENANT, LoraStore, Snapshot, Staged

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
        self._store = LoraStore(uri, accepts_base=accepted_bases)

    async def stage(self, upload: FolderUpload, module_shapes: Shapes) -> Staged:
        """The checked folder, its blobs stored. Raises: AdapterRefused, with every reason."""
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

    async def snapshot(self) -> Snapshot:
        return await asyncio.to_thread(self._store.snapshot)
