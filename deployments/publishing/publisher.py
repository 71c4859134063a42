"""Change the pool. A publish stages, embeds and probes, commits, and then lets every Retriever catch up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

from ray.serve.exceptions import DeploymentUnavailableError

from deployments.api.change_results import Published, Removed, Settled
from deployments.api.publish_item import PublishItem
from deployments.calls.background_tasks import Background
from deployments.calls.retriever_client import RetrieverClient
from deployments.calls.store_client import StoreClient
from deployments.calls.worker_client import WorkerClient
from deployments.observability.request_metrics import ChangeMetrics
from deployments.publishing.changes import Change, Charge, free_of_charge, kept_version, live_already, published_of
from deployments.publishing.reclaimer import Reclaimer
from deployments.publishing.validator import AdapterValidator, Outcome, ValidatedAdapter
from deployments.scaling.scale_from_zero import WorkerGate
from lora_store import (
    AdapterNotFound,
    AdapterRecord,
    AdapterRef,
    AdapterRefused,
    Key,
    QuotaExceeded,
    Staged,
    TenantQuota,
    VersionConflict,
    Visibility,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

CATCH_UP_TIMEOUT_S = 5.0
_STAGED_TOGETHER = 16
_MAX_SWAPS = 3  # of the encoder during one publish


class Publisher:
    """The only path by which adapters become live and stop being live. A change goes on if its caller leaves."""

    def __init__(
        self,
        store: StoreClient,
        retriever: RetrieverClient,
        worker: WorkerClient,
        *,
        background: Background,
        reclaimer: Reclaimer,
        gate: WorkerGate,
        metrics: ChangeMetrics | None = None,
    ) -> None:
        self._store, self._retriever, self._gate = store, retriever, gate
        self._validator = AdapterValidator(retriever, worker)
        self._background, self._reclaimer, self._metrics = background, reclaimer, metrics or ChangeMetrics()

    async def publish(
        self,
        uploads: Sequence[PublishItem],
        actor: str,
        quota: TenantQuota | None = None,
        charge: Charge = free_of_charge,
    ) -> list[Published | Exception]:
        """Publish every valid upload in one commit; return one result or error per upload, in order.

        Versions that are live already stay as they are. Raises, with nothing kept: the error of the Retriever or the
        Store for the whole batch; QuotaExceeded; WorkerStarting; the error of `charge`.
        """
        return await self._run("publish", self._publish(uploads, Change(actor, quota, charge=charge)))

    async def rollback(self, key: Key, digest: str | None, actor: str, charge: Charge = free_of_charge) -> Published:
        """Publish a kept version again: the one before the live one, or the one whose digest begins with `digest`.

        Raises: AdapterNotFound, VersionNotKept; the errors of `publish`.
        """
        return await self._run("rollback", self._rollback(key, digest, actor, charge))

    async def withdraw(self, tenant: str, names: Sequence[str], actor: str) -> Removed:
        """Withdraw all of `names` with all their versions, or none. Free their weights and blobs in the background.

        Raises: AdapterNotFound, VersionConflict, StoreUnavailable.
        """
        return await self._run("withdraw", self._withdraw(tenant, names, actor))

    async def set_visibility(self, key: Key, visibility: Visibility, actor: str) -> Settled:
        """Make an adapter public or private.

        Raises: AdapterNotFound, PublicNameTaken, VersionConflict, StoreUnavailable.
        """
        change = partial(self._store.set_visibility, *key, visibility, actor)
        return await self._run("set_visibility", self._settle(change))

    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> Settled:
        """Let `auto` choose these public versions for every tenant. Raises: AdapterNotFound, StoreUnavailable."""
        return await self._run("approve", self._settle(partial(self._store.approve, refs, actor)))

    async def lacking(self, uploads: Sequence[PublishItem]) -> list[PublishItem]:
        """Return the uploads whose name has no live version."""
        live = await self.live(uploads)
        return [upload for upload in uploads if (upload.tenant, upload.adapter_name) not in live]

    async def live(self, uploads: Sequence[PublishItem]) -> dict[Key, AdapterRecord]:
        """Return the live version of each name that has one."""
        kept = await self._store.versions([(upload.tenant, upload.adapter_name) for upload in uploads])
        return {key: versions[0] for key, versions in kept.items()}

    async def catch_up(self, generation: int) -> tuple[int, int]:
        """Return (replicas that serve `generation`, replicas that do not yet), or (0, 1) if that is unknown."""
        try:
            answers = await self._retriever.broadcast_catch_up(generation, CATCH_UP_TIMEOUT_S)
        except (TimeoutError, DeploymentUnavailableError) as exc:
            logger.warning("generation %d is committed, but not every replica serves it yet: %s", generation, exc)
            return 0, 1
        ready = sum(isinstance(answer, int) for answer in answers)
        return ready, len(answers) - ready

    async def _run(self, change: str, work: Coroutine[Any, Any, T]) -> T:
        return await self._background.run(self._metrics.count(change, work))

    async def _settle(self, change: Callable[[], Awaitable[int]]) -> Settled:
        await self._store.check_available()
        generation = await change()
        ready, behind = await self.catch_up(generation)
        return Settled(generation, ready, behind)

    async def _publish(self, uploads: Sequence[PublishItem], change: Change) -> list[Published | Exception]:
        active = await self._store.active_encoder()
        module_shapes = await self._gate.module_shapes()
        slots = asyncio.Semaphore(_STAGED_TOGETHER)  # the Store's other callers need room too

        async def stage(upload: PublishItem) -> Staged:
            async with slots:
                return await self._store.stage(upload, module_shapes)

        staged = await asyncio.gather(*map(stage, uploads), return_exceptions=True)
        return await self._make_live(staged, active, change)

    async def _rollback(self, key: Key, digest: str | None, actor: str, charge: Charge) -> Published:
        active = await self._store.active_encoder()
        kept = (await self._store.versions([key])).get(key, ())
        if not kept:
            raise AdapterNotFound(key[1])
        await self._gate.ready()
        staged = await self._store.restage(kept_version(kept, digest))
        change = Change(actor, precondition="kept", charge=charge)  # it may be withdrawn meanwhile
        [outcome] = await self._make_live([staged], active, change)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _withdraw(self, tenant: str, names: Sequence[str], actor: str) -> Removed:
        kept = await self._store.versions([(tenant, name) for name in names])
        try:
            withdrawn = await self._store.withdraw(tenant, names, actor, uuid4().hex)
            ready, behind = await self.catch_up(withdrawn.generation)
        finally:  # after an error they may be gone all the same; blobs that are still needed are not freed
            self._reclaimer.reclaim([record for versions in kept.values() for record in versions])
        logger.info("withdrew %d adapters at generation %d", len(names), withdrawn.generation)
        return Removed(tuple(names), withdrawn.generation, ready, behind)

    async def _make_live(
        self, staged: Sequence[Staged | BaseException], active: str | None, change: Change
    ) -> list[Published | Exception]:
        """Validate and commit; `active` is the active encoder.

        Discard what is not committed. If it is unknown whether the commit took place, leave the leases to expire.
        """
        held = [item for item in staged if isinstance(item, Staged)]
        older: Mapping[Key, tuple[AdapterRecord, ...]] = {}
        committed: set[int] = set()
        is_unsure = False
        try:
            older = await self._store.versions([(item.ref.tenant, item.ref.name) for item in held])
            live = live_already(held, older, active)
            outcomes = await self._validator.validate(staged, live, change.charge)
            is_unsure = True
            generation, outcomes = await self._commit(outcomes, change)
            is_unsure = False
            committed = {id(outcome.staged) for outcome in outcomes if isinstance(outcome, ValidatedAdapter)}
        except (AdapterRefused, AdapterNotFound, QuotaExceeded, VersionConflict):
            is_unsure = False
            raise
        finally:
            unused = [] if is_unsure else [item for item in held if id(item) not in committed]
            await self._discard(unused)
            pushed_out = [record for versions in older.values() for record in versions] if committed else []
            self._reclaimer.reclaim([*[item.record for item in unused], *pushed_out])
        generation, outcomes = await self._follow_encoder(generation, outcomes, change)
        generation = max([generation, *[record.generation for record in live.values()]])
        ready, behind = await self.catch_up(generation) if generation else (0, 0)
        return [published_of(outcome, generation, ready, behind) for outcome in outcomes]

    async def _commit(self, outcomes: list[Outcome], change: Change) -> tuple[int, list[Outcome]]:
        """Return (the generation of the commit, or 0 if nothing was new; the outcomes, taken names refused)."""
        while new := list(dict.fromkeys(outcome for outcome in outcomes if isinstance(outcome, ValidatedAdapter))):
            try:
                generation = await self._store.commit(
                    [item.staged for item in new],
                    [None if item.embedded is None else item.embedded.embedding for item in new],
                    [item.shift for item in new],
                    change.actor,
                    change.precondition,
                    change.quota,
                    uuid4().hex,  # a replica that died in the middle may have committed
                )
            except AdapterRefused as exc:  # another tenant owns this public name: continue without the adapter
                refused = [item for item in new if item.staged.ref.name == exc.name]
                if not refused:
                    raise
                outcomes = [exc if outcome in refused else outcome for outcome in outcomes]
                continue
            logger.info("published %d adapters at generation %d", len(new), generation)
            return generation, outcomes
        return 0, outcomes

    async def _follow_encoder(
        self, generation: int, outcomes: list[Outcome], change: Change
    ) -> tuple[int, list[Outcome]]:
        """Embed and commit again what a reindex overtook, because `auto` would not find it otherwise.

        The adapters are live in any case: a failure leaves their embedding to the next reindex.
        """
        try:
            for _ in range(_MAX_SWAPS):
                valid = [item for item in outcomes if isinstance(item, ValidatedAdapter)]
                embedded = [item for item in valid if item.embedded is not None]
                active = await self._store.active_encoder() if embedded else None
                if all(active in (None, item.encoder) for item in embedded):
                    break
                await self.catch_up(generation)
                again = await self._validator.embed_again(outcomes)
                generation, outcomes = await self._commit(again, Change(change.actor, precondition="live"))
        except Exception:
            logger.exception("adapters live at generation %d may lack an embedding by the new encoder", generation)
        return generation, outcomes

    async def _discard(self, staged: Sequence[Staged]) -> None:
        if not staged:
            return
        try:
            await self._store.discard(staged)
        except Exception:
            logger.warning("the staged files of %d adapters are left to gc", len(staged), exc_info=True)
