"""The Store deployment: the only writer of the catalogue, and the source of every blob."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import ray

from deployments.api.adapters import PublishItem
from deployments.auth.ray_token import require_token_mode
from deployments.byte_budget import ByteBudget
from deployments.calls.catalogue_clients import Buffer
from deployments.config.app import AppConfig
from deployments.errors import ShapesUnknown
from deployments.json_types import JsonObject
from deployments.observability.logs import join_serve_logs
from deployments.publishing.contract_files import read_contract
from deployments.publishing.source_folders import open_folder
from deployments.weights import ObjectCache
from gpu_worker.front.fair_threads import FairThreads
from lora_store import (
    AdapterRecord,
    AdapterRefused,
    Edit,
    Feedback,
    Key,
    LoraStore,
    Staged,
)
from lora_store.adapter import Shapes
from lora_store.feedback import Kind
from lora_store.garbage_collection import Verified
from lora_store.peft_config import read_base_model
from lora_store.usage import UsageQuery

P = ParamSpec("P")
T = TypeVar("T")
_NUM_STAGERS = 16  # with keys one tenant uses at most a half
_NUM_COMMITTERS = 4  # while one folds the catalogue, others commit; with keys one tenant uses at most a half
_OBJECT_CACHE_BYTES = 256 << 20  # weights in Ray's object store
_NO_VECTOR = np.empty(0, np.float32)


def in_thread(
    method: Callable[Concatenate[LoraStore, P], T],
) -> Callable[Concatenate[StoreDeployment, P], Coroutine[Any, Any, T]]:
    """Return the method of the deployment that runs this one of its store on a thread. It raises the same errors."""

    @functools.wraps(method)
    async def call(self: StoreDeployment, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(getattr(self._store, method.__name__), *args, **kwargs)

    return call


def in_turn(
    method: Callable[Concatenate[LoraStore, P], T], find_tenant: Callable[..., str] = lambda *_: ""
) -> Callable[Concatenate[StoreDeployment, P], Coroutine[Any, Any, T]]:
    """Return the method of the deployment that runs this one, a commit, in the turn of its tenant. Same errors.

    `find_tenant` returns the tenant for the arguments, by default the operator's turn.
    """

    @functools.wraps(method)
    async def call(self: StoreDeployment, /, *args: P.args, **kwargs: P.kwargs) -> T:
        work = partial(getattr(self._store, method.__name__), *args, **kwargs)
        return await asyncio.wrap_future(self._committers.submit(find_tenant(*args), work))

    return call


def _first(tenant: str, *_: object) -> str:
    return tenant


class StoreDeployment:
    """Handles writes and blobs; the Retriever handles reads. File operations run outside the event loop."""

    def __init__(
        self,
        config: AppConfig,
        put: Callable[[Buffer], Awaitable[Buffer]] = ray.put,
    ) -> None:
        join_serve_logs()
        require_token_mode(allow_unauthenticated=config.allow_unauthenticated_ray)
        self._config = config
        self._store = LoraStore(
            config.store_uri,
            accepts_base=config.served_models.accepted_names,
            read_contract=read_contract,
            limits=config.admission.limits,
        )
        self._store.check_writes(os.environ)
        # Separate threads: a batch from a slow source, or a contract whose check takes seconds, must not block the
        # workers' fetches.
        self._stagers = FairThreads(
            "stage", num_threads=_NUM_STAGERS, max_calls=sys.maxsize, full="", leaves_room=config.has_keys
        )
        # Commits wait for each other, so waiting ones must not take the threads of other calls.
        self._committers = FairThreads(
            "commit", num_threads=_NUM_COMMITTERS, max_calls=sys.maxsize, full="", leaves_room=config.has_keys
        )
        self._staging = ByteBudget(
            config.max_upload_total_bytes, always_bytes=config.max_upload_bytes, has_tenants=config.has_keys
        )
        # Any key may ask for a report, which holds a day of events in memory, and may leave before it ends.
        self._reports = FairThreads(
            "report", num_threads=1, max_calls=64, full="too many reports of usage are being made; retry later"
        )
        self._objects: ObjectCache[Awaitable[Buffer]] = ObjectCache(self._store.read_parts, put, _OBJECT_CACHE_BYTES)

    async def stage(self, upload: PublishItem, shapes_by_model: Mapping[str, Shapes]) -> Staged:
        """Validate an adapter, store its blobs and lease them until `commit` or `discard`.

        `shapes_by_model`: the module shapes of each served base model whose workers have told them.
        Raises: AdapterRefused, with every reason; QuotaExceeded; SourceRefused, SourceMissing, SourceUnavailable,
        StoreUnavailable; UploadMemoryFull if the byte budget had no room for a minute, UploadDiskFull; ShapesUnknown
        for an adapter of another base model.
        """
        if upload.adapter_name in self._config.served_models.accepted_names:
            raise AdapterRefused(upload.adapter_name, ["this is a name of the base model; choose another name"])
        work = partial(self._stage, upload, shapes_by_model)
        return await asyncio.wrap_future(self._stagers.submit(upload.tenant, work))

    def _stage(self, upload: PublishItem, shapes_by_model: Mapping[str, Shapes]) -> Staged:
        config = self._config
        prefixes = config.find_source_prefixes(upload.tenant) if upload.source is not None else ()
        read_parts = self._store.uploads.parts
        with open_folder(upload, prefixes, config.max_upload_bytes, self._staging, read_parts) as (folder, is_copy):
            model = config.served_models.first
            if config.served_models.are_several:
                named = upload.base_model or read_base_model(folder, config.admission.limits)
                model = config.served_models.made_for(named)
            if model.name not in shapes_by_model:
                raise ShapesUnknown(model.name)
            return self._store.stage(
                folder,
                is_private=is_copy,
                module_shapes=shapes_by_model[model.name],
                templates=model.known_templates,
                read_contract=partial(read_contract, context=model.max_model_len),
                name=upload.adapter_name,
                tenant=upload.tenant,
                tags=upload.tags,
                template=upload.template,
                contract=upload.contract,
                visibility=upload.visibility or upload.default_visibility,
                keeps_visibility=upload.visibility is None,
                has_samples=upload.has_samples,
                source=upload.adapter_name if upload.source is None else upload.source,
                ttl_s=upload.ttl_s,
                share=upload.share,
                is_shadow=upload.is_shadow,
                base_model=upload.base_model,
                quota=upload.quota,
            )

    async def edit(self, live: AdapterRecord, edit: Edit) -> Staged:
        """Stage the weights of the live version with these changes, as `LoraStore.edit` does. Same errors."""
        model = self._config.served_models.made_for(live.base_model)
        read = partial(read_contract, context=model.max_model_len)
        work = partial(self._store.edit, live, edit, read, model.known_templates)
        if not edit.contract:
            return await asyncio.to_thread(work)
        return await asyncio.wrap_future(self._stagers.submit(live.ref.tenant, work))

    async def put_part(self, upload: str, number: int, data: Buffer) -> None:
        """Store one part of an uploaded file until `delete_parts`. Raises: StoreUnavailable."""
        await asyncio.to_thread(self._store.uploads.put, upload, number, data.data)

    async def delete_parts(self, uploads: Collection[str]) -> None:
        """Delete the parts of these files."""
        await asyncio.to_thread(self._store.uploads.delete, uploads)

    restage = in_thread(LoraStore.restage)
    take_over = in_thread(LoraStore.take_over)
    resample = in_thread(LoraStore.resample)
    commit = in_turn(LoraStore.commit, lambda staged, *_: staged[0].ref.tenant)
    check_commit = in_thread(LoraStore.check_commit)
    discard = in_thread(LoraStore.discard)
    withdraw = in_turn(LoraStore.withdraw, _first)
    expire = in_turn(LoraStore.expire)
    set_visibility = in_turn(LoraStore.set_visibility, _first)
    set_trial = in_turn(LoraStore.set_trial, _first)
    approve = in_turn(LoraStore.approve)
    set_name = in_turn(LoraStore.set_name, lambda key, *_: key[0])
    approve_name = in_turn(LoraStore.approve_name)
    add_embeddings = in_turn(LoraStore.add_embeddings)
    rank = in_turn(LoraStore.rank, _first)
    activate_encoder = in_turn(LoraStore.activate_encoder)
    sweep = in_thread(LoraStore.sweep)
    gc = in_thread(LoraStore.gc)
    pool_part = in_thread(LoraStore.pool_part)

    async def pool_state(self, tenant: str | None) -> bytes:
        """Return the state of the pool, or of one tenant's adapters, as `PoolState.from_parquet` reads it."""
        return await asyncio.to_thread(lambda: self._store.pool_state(tenant).to_parquet())

    async def put_feedback(self, tenant: str, kind: Kind, feedback: Feedback) -> None:
        """Store what a client said about a prompt, in place of what it said about it before."""
        await asyncio.to_thread(self._store.feedback.put, tenant, kind, feedback, datetime.now(UTC))

    async def asked(self, tenant: str, request_id: str) -> Feedback | None:
        """Return the prompt of a request of this tenant, None if it is not kept."""
        return await asyncio.to_thread(self._store.feedback.get, tenant, "asked", request_id)

    async def feedback(self, tenant: str, kind: Kind, adapter: str | None = None) -> list[Feedback]:
        """Return the proposals for an adapter that wait, or the outcomes of a tenant, newest first."""
        return await asyncio.to_thread(self._store.feedback.all, tenant, kind, adapter)

    async def tenants_with_outcomes(self) -> list[str]:
        """Return the tenants whose outcomes were applied."""
        snapshot = await asyncio.to_thread(self._store.snapshot)
        return [tenant for tenant, ranks in snapshot.rankings.items() if any(rank.ranking.is_outcome for rank in ranks)]

    async def delete_proposals(self, tenant: str, adapter: str, ids: Collection[str]) -> None:
        """Delete these proposals for an adapter."""
        await asyncio.to_thread(self._store.feedback.delete, tenant, adapter, ids)

    async def put_usage(self, segment: str, lines: bytes) -> None:
        """Store the usage events of a segment. Raises: StoreUnavailable."""
        kept = timedelta(self._config.usage_days)
        await asyncio.to_thread(self._store.usage.put, segment, lines, datetime.now(UTC), kept)

    async def usage(self, query: UsageQuery) -> list[JsonObject]:
        """Return the sums of the stored usage events. Raises: StoreUnavailable, EngineFull."""
        work = partial(self._store.usage.sums, query)
        return await asyncio.wrap_future(self._reports.submit(query.tenant or "", work))

    async def ping(self) -> None:
        """Check that the catalogue can be read. Raises: StoreUnavailable."""
        await asyncio.to_thread(self._store.snapshot)

    async def active_encoder(self) -> str | None:
        """Return the identity of the encoder that a reindex activated; None for the one of the settings."""
        snapshot = await asyncio.to_thread(self._store.snapshot)
        return None if snapshot.encoder is None else snapshot.encoder.identity

    async def versions(self, keys: Collection[Key]) -> dict[Key, tuple[AdapterRecord, ...]]:
        """Return the kept versions of the live names, the live one first; of embeddings only their encoder."""
        snapshot = await asyncio.to_thread(self._store.snapshot)
        found = {key: snapshot.versions(key) for key in keys}
        return {key: tuple(map(_without_vectors, kept)) for key, kept in found.items() if kept}

    async def unreferenced(self, digests: Collection[str]) -> list[str]:
        """Return those blobs that no kept version needs."""
        snapshot = await asyncio.to_thread(self._store.snapshot)
        return sorted(set(digests) - snapshot.referenced())

    async def verify(self, tenant: str) -> AsyncGenerator[Verified]:
        """Read and hash again every blob of the versions that `tenant` sees: its own and the public ones."""
        wanted = await asyncio.to_thread(self._store.to_verify, tenant)
        checks, total = iter(self._store.verify(wanted)), len(wanted)
        done = 0
        while (check := await asyncio.to_thread(next, checks, None)) is not None:
            done += 1
            yield Verified(done, total, check)

    async def fetch(self, digest: str, is_suspect: bool = False) -> list[Awaitable[Buffer]]:
        """Return references to the parts of the canonical bytes in Ray's object store, which this replica owns.

        The caller hashes them. `is_suspect`: it found another hash, so the stored file is hashed and read again.
        Raises: AdapterNotFound, StoreUnavailable; BlobCorrupted if the stored file is suspect and damaged.
        """
        if is_suspect:
            self._objects.release([digest])
            await asyncio.to_thread(self._store.check, digest)
        return list(await self._objects.get(digest))

    async def release(self, digests: Collection[str]) -> bool:
        """Drop the references to these."""
        self._objects.release(digests)
        return True


def _without_vectors(record: AdapterRecord) -> AdapterRecord:
    if record.embedding is None:
        return record
    return replace(record, embedding=replace(record.embedding, vector=_NO_VECTOR, own_scores=_NO_VECTOR))
