"""How the pool changes, over the handles. Publish: stage, embed and probe, commit, then every Retriever catches up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from uuid import uuid4

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.api.change_results import Published, Removed, Settled
from deployments.api.publish_item import PublishItem
from deployments.calls.background_tasks import Background
from deployments.calls.retries import retry_on_replica_death
from deployments.calls.transport import over_object_store
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
    StoreUnavailable,
    TenantQuota,
    VersionConflict,
    Visibility,
    Withdrawn,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

CATCH_UP_TIMEOUT_S = 5.0
_STORE_WAIT_S = 60.0  # longer than a store that hangs takes to be called unavailable
_STAGED_TOGETHER = 16
_MAX_SWAPS = 3  # of the encoder during one publish


class Publisher:
    """The only path by which adapters become live, and cease to be. What has begun ends even if its caller leaves."""

    def __init__(
        self,
        store: DeploymentHandle,
        retriever: DeploymentHandle,
        worker: DeploymentHandle,
        *,
        background: Background,
        releaser: Reclaimer,
        waking: WorkerGate,
        metrics: ChangeMetrics | None = None,
    ) -> None:
        self._store, self._retriever, self._worker, self._waking = store, retriever, worker, waking
        self._examiner = AdapterValidator(retriever, worker)
        self._background, self._releaser, self._metrics = background, releaser, metrics or ChangeMetrics()

    async def publish(
        self,
        uploads: Sequence[PublishItem],
        actor: str,
        share: TenantQuota | None = None,
        charge: Charge = free_of_charge,
    ) -> list[Published | Exception]:
        """Publish all that can be, in one commit; what cannot has its error in its place. What is live stays as it is.

        Raises: what the Retriever or the Store says of the batch as a whole, QuotaExceeded where it is more than
        the tenant's `share`, WorkerStarting, what `charge` raises; then nothing of it is visible or kept.
        """
        return await self._run("publish", self._publish(uploads, Change(actor, share, charge=charge)))

    async def rollback(self, key: Key, digest: str | None, actor: str, charge: Charge = free_of_charge) -> Published:
        """Publish a kept version again: the one before the live one, or the one whose digest begins with `digest`.

        Raises: AdapterNotFound, VersionNotKept, and what `publish` has for it.
        """
        return await self._run("rollback", self._rollback(key, digest, actor, charge))

    async def withdraw(self, tenant: str, names: Sequence[str], actor: str) -> Removed:
        """All of `names` with all their versions are gone, or none; what they held is freed in the background.

        Raises: AdapterNotFound, VersionConflict, StoreUnavailable.
        """
        return await self._run("withdraw", self._withdraw(tenant, names, actor))

    async def set_visibility(self, key: Key, visibility: Visibility, actor: str) -> Settled:
        """Raises: AdapterNotFound, PublicNameTaken, VersionConflict, StoreUnavailable."""
        return await self._run("set_visibility", self._settled("set_visibility", *key, visibility, actor))

    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> Settled:
        """`auto` may choose these public versions for every tenant. Raises: AdapterNotFound, StoreUnavailable."""
        return await self._run("approve", self._settled("approve", refs, actor))

    async def lacking(self, uploads: Sequence[PublishItem]) -> list[PublishItem]:
        """Return those whose name is not live, in whatever version."""
        live = await self.live(uploads)
        return [upload for upload in uploads if (upload.tenant, upload.adapter_name) not in live]

    async def live(self, uploads: Sequence[PublishItem]) -> dict[Key, AdapterRecord]:
        """Return the live version of each name that has one."""
        await self.reach_store()
        keys = [(upload.tenant, upload.adapter_name) for upload in uploads]
        kept = await retry_on_replica_death(self._store.versions, keys)
        return {key: versions[0] for key, versions in kept.items()}

    async def reach_store(self) -> str | None:
        """The identity of the encoder a reindex activated, None without one: asked before a change begins.

        Raises: StoreUnavailable, also when no replica answers in time: one cannot start while its disk is away.
        """
        try:
            async with asyncio.timeout(_STORE_WAIT_S):
                active: str | None = await retry_on_replica_death(self._store.active_encoder)
                return active
        except TimeoutError as exc:
            raise StoreUnavailable(f"none of its replicas answered within {_STORE_WAIT_S:.0f} s") from exc

    async def catch_up(self, generation: int) -> tuple[int, int]:
        """(replicas that serve `generation`, replicas that do not yet); (0, 1) where Ray 2.60 gives up on them all."""
        response = self._retriever.broadcast("catch_up", generation)
        try:
            results = await response.results_async(timeout_s=CATCH_UP_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError) as exc:
            logger.warning("generation %d is committed, but not every replica has it yet: %s", generation, exc)
            return 0, 1
        ready = sum(isinstance(result, int) for result in results)
        return ready, len(results) - ready

    async def _run(self, change: str, work: Coroutine[Any, Any, T]) -> T:
        return await self._background.run(self._metrics.count(change, work))

    async def _settled(self, method: str, *args: Any) -> Settled:
        await self.reach_store()
        generation: int = await getattr(self._store, method).remote(*args)
        ready, behind = await self.catch_up(generation)
        return Settled(generation, ready, behind)

    async def _publish(self, uploads: Sequence[PublishItem], change: Change) -> list[Published | Exception]:
        active = await self.reach_store()
        await self._waking.wait()
        module_shapes = await retry_on_replica_death(self._worker.module_shapes)
        store = over_object_store(self._store)  # large files are not copied where they arrive
        slots = asyncio.Semaphore(_STAGED_TOGETHER)  # the Store's other callers need room too

        async def stage(upload: PublishItem) -> Staged:
            async with slots:
                staged: Staged = await retry_on_replica_death(store.stage, upload, module_shapes)
                return staged

        staged = await asyncio.gather(*map(stage, uploads), return_exceptions=True)
        return await self._make_live(staged, active, change)

    async def _rollback(self, key: Key, digest: str | None, actor: str, charge: Charge) -> Published:
        active = await self.reach_store()
        kept = (await retry_on_replica_death(self._store.versions, [key])).get(key, ())
        if not kept:
            raise AdapterNotFound(key[1])
        await self._waking.wait()
        staged = await retry_on_replica_death(self._store.restage, kept_version(kept, digest))
        change = Change(actor, precondition="kept", charge=charge)  # it may be withdrawn meanwhile
        [outcome] = await self._make_live([staged], active, change)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _withdraw(self, tenant: str, names: Sequence[str], actor: str) -> Removed:
        await self.reach_store()
        kept = await retry_on_replica_death(self._store.versions, [(tenant, name) for name in names])
        try:
            withdrawn: Withdrawn = await retry_on_replica_death(self._store.withdraw, tenant, names, actor, uuid4().hex)
            ready, behind = await self.catch_up(withdrawn.generation)
        finally:  # an error may come although they are gone; what is still needed is not freed
            self._releaser.release([record for versions in kept.values() for record in versions])
        logger.info("withdrew %d adapters at generation %d", len(names), withdrawn.generation)
        return Removed(tuple(names), withdrawn.generation, ready, behind)

    async def _make_live(
        self, staged: Sequence[Staged | BaseException], active: str | None, change: Change
    ) -> list[Published | Exception]:
        """Examine and commit; `active` is the encoder in force.

        What is not committed is discarded, unless that is not known: then the holds stand until they are dead.
        """
        held = [item for item in staged if isinstance(item, Staged)]
        older: Mapping[Key, tuple[AdapterRecord, ...]] = {}
        committed: set[int] = set()
        is_unsure = False
        try:
            keys = [(item.ref.tenant, item.ref.name) for item in held]
            older = await retry_on_replica_death(self._store.versions, keys)
            live = live_already(held, older, active)
            outcomes = await self._examiner.examine(staged, live, change.charge)
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
            self._releaser.release([*[item.record for item in unused], *pushed_out])
        generation, outcomes = await self._follow_encoder(generation, outcomes, change)
        generation = max([generation, *[record.generation for record in live.values()]])
        ready, behind = await self.catch_up(generation) if generation else (0, 0)
        return [published_of(outcome, generation, ready, behind) for outcome in outcomes]

    async def _commit(self, outcomes: list[Outcome], change: Change) -> tuple[int, list[Outcome]]:
        """(generation at which all that is new is live, 0 without any; the outcomes, a name that is taken refused)."""
        while new := list(dict.fromkeys(outcome for outcome in outcomes if isinstance(outcome, ValidatedAdapter))):
            try:
                generation: int = await retry_on_replica_death(
                    self._store.commit,
                    [item.staged for item in new],
                    [None if item.embedded is None else item.embedded.embedding for item in new],
                    [item.shift for item in new],
                    change.actor,
                    change.precondition,
                    change.share,
                    uuid4().hex,  # a replica that died in the middle may have committed
                )
            except AdapterRefused as exc:  # one public name belongs to another tenant: the others go on without it
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
        """What a reindex overtook is embedded by its encoder and committed once more: else `auto` would miss it.

        It is live whatever happens here: a failure leaves it to the next reindex.
        """
        try:
            for _ in range(_MAX_SWAPS):
                valid = [item for item in outcomes if isinstance(item, ValidatedAdapter)]
                embedded = [item for item in valid if item.embedded is not None]
                active = await self.reach_store() if embedded else None
                if all(active in (None, item.encoder) for item in embedded):
                    break
                await self.catch_up(generation)
                again = await self._examiner.embed_again(outcomes)
                generation, outcomes = await self._commit(again, Change(change.actor, precondition="live"))
        except Exception:
            logger.exception("what became live at generation %d may lack an embedding by a new encoder", generation)
        return generation, outcomes

    async def _discard(self, staged: Sequence[Staged]) -> None:
        if not staged:
            return
        try:
            await self._store.discard.remote(staged)
        except Exception:
            logger.warning("what was staged of %d adapters is left to gc", len(staged), exc_info=True)
