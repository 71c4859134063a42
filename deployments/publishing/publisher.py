"""Change the pool: stage, validate and commit adapters, then wait until every Retriever replica serves the change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar
from uuid import uuid4

from ray.serve.exceptions import DeploymentUnavailableError

from deployments.api.adapters import PublishItem
from deployments.api.responses import Published, Settled
from deployments.background import Background
from deployments.calls.catalogue_clients import RetrieverClient, StoreClient
from deployments.calls.worker_client import Workers
from deployments.errors import (
    NoAnswerInTime,
    NoTrial,
    ShapesUnknown,
    VersionChanged,
    VersionNotKept,
    WorkerStarting,
)
from deployments.observability.request_metrics import ChangeMetrics
from deployments.publishing.reclaimer import Reclaimer
from deployments.publishing.results import make_result, make_results
from deployments.publishing.validator import AdapterValidator, Charge, Outcome, ValidatedAdapter, free_of_charge
from lora_store import (
    AdapterNotFound,
    AdapterRecord,
    AdapterRef,
    AdapterRefused,
    Edit,
    Key,
    Precondition,
    QuotaExceeded,
    Sample,
    Staged,
    TenantQuota,
    Trial,
    VersionConflict,
    Visibility,
)
from lora_store.adapter import Shapes

_MIN_DIGEST_CHARS = 8
logger = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")
Listener = Callable[[str, str], None]  # (tenant, author)
CATCH_UP_TIMEOUT_S = 5.0
_STAGED_TOGETHER = 16
_MAX_SWAPS = 3  # changes of the encoder, or of what a version keeps, during one publish


@dataclass(frozen=True, slots=True)
class Change:
    """The author of a change, and its limits.

    `quota`: the tenant's; `precondition`: on the versions just before the commit; `charge`: receives the number of
    tokens that the encoder is about to read; `is_dry`: validate and commit nothing.
    """

    actor: str
    quota: TenantQuota | None = None
    precondition: Precondition = "any"
    charge: Charge = free_of_charge
    is_dry: bool = False


def live_already(
    staged: Sequence[Staged], older: Mapping[Key, tuple[AdapterRecord, ...]], active: str
) -> dict[AdapterRef, AdapterRecord]:
    """Return the live versions that need no publish: visibility as requested, and embedded by the encoder in service.

    A version without samples needs no embedding.
    """
    now = [kept[0] for kept in older.values()]
    live = {record.ref: record for record in now if not record.samples_digest or record.encoder == active}
    for item in staged:
        record = live.get(item.ref)
        if record is None:
            continue
        is_changed = "visibility" not in item.keeps and record.visibility != item.record.visibility
        if is_changed or item.record.is_offered or record.expires_at != item.record.expires_at:
            del live[item.ref]
    return live


def kept_version(kept: Sequence[AdapterRecord], digest: str | None) -> AdapterRecord:
    """Return the version to roll back to; `kept` is sorted newest first. Raises: VersionNotKept."""
    if digest is None:
        matching = [record for record in kept[1:] if not record.is_offered][:1]
    else:
        long_enough = len(digest) >= _MIN_DIGEST_CHARS
        matching = [record for record in kept if long_enough and record.ref.digest.startswith(digest)]
    if len(matching) != 1:
        raise VersionNotKept(kept[0].ref.name, digest, [record.ref.digest for record in kept])
    return matching[0]


def run_to_end(
    method: Callable[Concatenate[Publisher, P], Coroutine[object, object, T]],
) -> Callable[Concatenate[Publisher, P], Coroutine[object, object, T]]:
    """Count the outcome of the method, and run it to its end even if its caller leaves."""

    @wraps(method)
    async def run(self: Publisher, /, *args: P.args, **kwargs: P.kwargs) -> T:
        name = "dry_run" if kwargs.get("is_dry") else method.__name__
        return await self.background.run(self.metrics.count(name, method(self, *args, **kwargs)))

    return run


class Publisher:
    """The only component that publishes and withdraws adapters. A change continues if its caller leaves."""

    def __init__(
        self,
        store: StoreClient,
        retriever: RetrieverClient,
        workers: Workers,
        *,
        background: Background,
        reclaimer: Reclaimer,
        metrics: ChangeMetrics,
    ) -> None:
        self._store, self._retriever, self._workers = store, retriever, workers
        self._validator = AdapterValidator(retriever, workers)
        self.background, self.metrics, self._reclaimer = background, metrics, reclaimer
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` with the tenant and the author of every later commit of new versions."""
        self._listeners.append(listener)

    @run_to_end
    async def publish(
        self,
        uploads: Sequence[PublishItem],
        actor: str,
        charge: Charge = free_of_charge,
        held: AbstractContextManager[object] | None = None,
        *,
        is_dry: bool = False,
    ) -> list[Published | Exception]:
        """Publish every valid upload, all of one tenant, in one commit; return one result or error each, in order.

        Versions that are live already do not change. `held` is left at the end, even if the caller has left before.
        `is_dry`: only validate, at generation 0, and store nothing.
        Raises, without any change: the error of the Retriever or the Store for the whole batch; QuotaExceeded;
        WorkerStarting; the error of `charge`.
        """
        with held or nullcontext():
            try:
                active = await self._find_encoder()
                staged = await self._stage_all(uploads)
            finally:
                if sent := [id for upload in uploads for id in upload.sent]:
                    await _clean_up(f"the parts of {len(sent)} uploaded files", self._store.delete_parts(sent))
            quota = uploads[0].quota if uploads else None
            return await self._make_live(staged, active, Change(actor, quota, charge=charge, is_dry=is_dry))

    @run_to_end
    async def rollback(self, key: Key, digest: str | None, actor: str, charge: Charge = free_of_charge) -> Published:
        """Publish a kept version again: the one before the live one, or the one whose digest begins with `digest`.

        A trial ends. Then the live version stays without `digest`, and with its own.
        Raises: AdapterNotFound, VersionNotKept; the errors of `publish`.
        """
        active = await self._find_encoder()
        kept = await self.kept(key)
        is_tried = kept[0].trial is not None
        wanted = kept[0] if is_tried and digest is None else kept_version(kept, digest)
        if is_tried and wanted.ref == kept[0].ref:
            return await self._end_trial(kept[0], active, actor)
        change = Change(actor, precondition="kept", charge=charge)  # it may have been withdrawn meanwhile
        return await self._publish_staged(wanted.base_model, lambda: self._store.restage(wanted), active, change)

    @run_to_end
    async def resample(
        self, live: AdapterRecord, samples: Sequence[Sample] | None, actor: str, charge: Charge = free_of_charge
    ) -> Published:
        """Publish the live version's weights with other samples; None: its own without accepted prompts.

        Raises: AdapterNotFound; VersionConflict if another version is live by now; the errors of `publish`.
        """
        active = await self._find_encoder()
        stage = partial(self._store.resample, live, samples)
        return await self._publish_staged(live.base_model, stage, active, Change(actor, charge=charge))

    @run_to_end
    async def edit(
        self,
        key: Key,
        edit: Edit,
        digest: str | None,
        actor: str,
        quota: TenantQuota | None = None,
        charge: Charge = free_of_charge,
    ) -> Published:
        """Publish the live version's weights with these changes. `digest`: the version that must be live; None: any.

        Raises: AdapterNotFound; VersionChanged; VersionConflict if another version becomes live meanwhile; the errors
        of `publish`.
        """
        active = await self._find_encoder()
        live = (await self.kept(key))[0]
        if digest is not None and digest != live.ref.digest:
            raise VersionChanged(key[1], digest, live.ref.digest)
        stage = partial(self._store.edit, live, edit)
        return await self._publish_staged(live.base_model, stage, active, Change(actor, quota, charge=charge))

    @run_to_end
    async def withdraw(self, tenant: str, names: Sequence[str], actor: str) -> Settled:
        """Withdraw all of `names` with all their versions, or none. Free their weights and blobs in the background.

        Raises: AdapterNotFound, VersionConflict, StoreUnavailable.
        """
        kept = await self._store.versions([(tenant, name) for name in names])
        try:
            withdrawn = await self._store.withdraw(tenant, names, actor, uuid4().hex)
            settled = await self.catch_up(withdrawn.generation)
        finally:  # after an error they may be withdrawn nevertheless; blobs still in use are not freed
            self._reclaimer.reclaim([record for versions in kept.values() for record in versions])
        logger.info("withdrew %d adapters at generation %d", len(names), withdrawn.generation)
        return settled

    async def expire(self) -> int:
        """Withdraw the unlisted adapters whose time to live is over, and free them. Return how many versions they had.

        Raises: StoreUnavailable, VersionConflict.
        """
        withdrawn = await self._store.expire(uuid4().hex)
        if withdrawn.records:
            self._reclaimer.reclaim(withdrawn.records)
            await self.catch_up(withdrawn.generation)
            logger.info("withdrew %d expired versions at generation %d", len(withdrawn.records), withdrawn.generation)
        return len(withdrawn.records)

    @run_to_end
    async def set_visibility(self, key: Key, visibility: Visibility, actor: str) -> Settled:
        """Make an adapter public or private.

        Raises: AdapterNotFound, PublicNameTaken, VersionConflict, StoreUnavailable.
        """
        return await self._settle(partial(self._store.set_visibility, *key, visibility, actor))

    @run_to_end
    async def set_trial(
        self, key: Key, digest: str | None, share: float, actor: str, *, is_shadow: bool = False
    ) -> tuple[Trial | None, Settled]:
        """Let a kept version answer this share of the requests to a name, or end that with a share of 0.

        `digest`: its beginning, None for the version under trial. Return the trial.
        Raises: AdapterNotFound, VersionNotKept, AdapterRefused, VersionConflict, StoreUnavailable.
        """
        kept = await self.kept(key)
        trial = None
        if share:
            running = kept[0].trial
            wanted = running.digest if digest is None and running is not None else digest
            if wanted is None:
                raise NoTrial(key[1], [record.ref.digest for record in kept[1:]])
            version = kept_version(kept, wanted)
            if refused := self._refuse_other_base(version, kept[0]):
                raise refused
            trial = Trial(version.ref.digest, share, is_shadow)
        return trial, await self._settle(partial(self._store.set_trial, *key, trial, actor))

    @run_to_end
    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> Settled:
        """Let `auto` choose these public versions for every tenant. Raises: AdapterNotFound, StoreUnavailable."""
        return await self._settle(partial(self._store.approve, refs, actor))

    async def change_name(self, change: Callable[[], Awaitable[int]]) -> Settled:
        """Commit a change of a model name, and wait for the Retriever replicas. Raises: as `change`."""
        return await self.background.run(self.metrics.count("name", self._settle(change)))

    async def kept(self, key: Key) -> tuple[AdapterRecord, ...]:
        """Return the kept versions of a name, the live one first. Raises: AdapterNotFound."""
        kept = (await self._store.versions([key])).get(key, ())
        if not kept:
            raise AdapterNotFound(key[1])
        return kept

    async def live(self, uploads: Sequence[PublishItem]) -> dict[Key, AdapterRecord]:
        """Return the live version of each name that has one."""
        kept = await self._store.versions([(upload.tenant, upload.adapter_name) for upload in uploads])
        return {key: versions[0] for key, versions in kept.items()}

    async def catch_up(self, generation: int) -> Settled:
        """Wait for the Retriever replicas to serve `generation`. If it is unknown which do, one counts as behind."""
        try:
            answers = await self._retriever.broadcast_catch_up(generation, CATCH_UP_TIMEOUT_S)
        except (TimeoutError, DeploymentUnavailableError) as exc:
            logger.warning("generation %d is committed, but not every replica serves it yet: %s", generation, exc)
            return Settled(generation, 0, 1)
        ready = sum(isinstance(answer, int) for answer in answers)
        return Settled(generation, ready, len(answers) - ready)

    async def _settle(self, change: Callable[[], Awaitable[int]]) -> Settled:
        await self._store.ping()
        return await self.catch_up(await change())

    async def _stage_all(self, uploads: Sequence[PublishItem]) -> list[Staged | BaseException]:
        """Stage the uploads. Ask only the workers of base models that they are made for: others may sleep or hang."""
        slots = asyncio.Semaphore(_STAGED_TOGETHER)  # the others of one request wait here
        asked: dict[str, asyncio.Task[Shapes]] = {}
        told = await self._workers.module_shapes()

        async def stage(upload: PublishItem) -> Staged:
            async with slots:
                try:
                    return await self._store.stage(upload, told)
                except ShapesUnknown as exc:
                    base_model = exc.base_model
                if base_model not in asked:
                    asked[base_model] = asyncio.create_task(self._workers.named(base_model).module_shapes())
                return await self._store.stage(upload, {base_model: await asked[base_model]})

        staged = await asyncio.gather(*map(stage, uploads), return_exceptions=True)
        waited = [item for item in staged if isinstance(item, NoAnswerInTime | WorkerStarting)]
        if waited and len(waited) == len(staged):
            raise waited[0]
        return staged

    async def _publish_staged(
        self, base_model: str, stage: Callable[[], Awaitable[Staged]], active: str, change: Change
    ) -> Published:
        """Publish the version that `stage` makes of stored weights; `active` is the encoder in service."""
        await self._workers.made_for(base_model).module_shapes()  # before anything is staged: a worker must probe it
        [outcome] = await self._make_live([await stage()], active, change)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _find_encoder(self) -> str:
        """Return the identity of the encoder in service: before the first reindex the Retriever chooses it."""
        return await self._store.active_encoder() or (await self._retriever.index_stats()).encoder

    async def _end_trial(self, live: AdapterRecord, active: str, actor: str) -> Published:
        settled = await self._settle(partial(self._store.set_trial, live.ref.tenant, live.ref.name, None, actor))
        embedding = live.embedding if live.encoder == active else None  # `auto` does not find another one
        ended = replace(live, generation=settled.generation, trial=None, embedding=embedding)
        result = make_result(ended, settled)
        assert isinstance(result, Published)
        return result

    async def _make_live(
        self, staged: Sequence[Staged | BaseException], active: str, change: Change
    ) -> list[Published | Exception]:
        """Validate and commit; `active` is the encoder in service.

        Discard what is not committed. If it is unknown whether the commit took place, leave the leases to expire.
        """
        held = [item for item in staged if isinstance(item, Staged)]
        older: Mapping[Key, tuple[AdapterRecord, ...]] = {}
        committed: set[str] = set()
        try:
            for item in staged:
                if isinstance(item, QuotaExceeded):
                    raise item
            older = await self._store.versions([item.ref.key for item in held])
            staged = [self._check_trial(item, older) for item in staged]
            live = live_already(held, older, active)
            outcomes = await self._validator.validate(staged, live, change.charge)
            if change.is_dry:
                _, outcomes = await self._commit(outcomes, change, held)
                return await asyncio.to_thread(make_results, staged, outcomes, older, Settled(0, 0, 0))
            generation, outcomes = await self._commit(outcomes, change, held)
            committed = {outcome.staged.lease for outcome in outcomes if isinstance(outcome, ValidatedAdapter)}
        finally:
            unused = [item for item in held if item.lease not in committed]
            if unused:
                await _clean_up(f"the staged files of {len(unused)} adapters", self._store.discard(unused))
            pushed_out = [record for versions in older.values() for record in versions] if committed else []
            if replaced := [*[item.record for item in unused], *pushed_out]:
                self._reclaimer.reclaim(replaced)
        generation, outcomes = await self._follow_encoder(generation, outcomes, change)
        generation = max([generation, *[record.generation for record in live.values()]])
        settled = await self.catch_up(generation) if generation else Settled(0, 0, 0)
        new = [outcome for outcome in outcomes if isinstance(outcome, ValidatedAdapter)]
        for tenant in dict.fromkeys(outcome.staged.ref.tenant for outcome in new):
            for listener in self._listeners:
                listener(tenant, change.actor)
        return await asyncio.to_thread(make_results, staged, outcomes, older, settled)  # warnings compare all samples

    def _check_trial(
        self, item: Staged | BaseException, older: Mapping[Key, Sequence[AdapterRecord]]
    ) -> Staged | BaseException:
        """Return the error of a version that is to share the requests of one of another base model, else the item."""
        if not isinstance(item, Staged) or not item.record.is_offered:
            return item
        kept = older.get(item.ref.key)
        refused = self._refuse_other_base(item.record, kept[0]) if kept else None
        return item if refused is None else refused

    def _refuse_other_base(self, version: AdapterRecord, live: AdapterRecord) -> AdapterRefused | None:
        """Return the error if versions that would share requests have different base models."""
        if self._workers.has_same_base(version.base_model, live.base_model):
            return None
        reason = (
            f"the live version is for the base model {live.base_model!r} and this one for {version.base_model!r}:"
            " versions that share requests need the same one; publish it under another name, or without a share"
        )
        return AdapterRefused(version.ref.name, [reason])

    async def _commit(self, outcomes: list[Outcome], change: Change, held: list[Staged]) -> tuple[int, list[Outcome]]:
        """Return (the generation of the commit, or 0 if nothing was new; the outcomes, taken names refused).

        If another publish changed what versions keep, take that over and commit again, so that neither is lost. A dry
        run only refuses what the commit would refuse.
        `held`: what the caller must discard. Versions with new leases are added; it is emptied if the commit may have
        taken place.
        """
        num_conflicts = 0
        while new := list(dict.fromkeys(outcome for outcome in outcomes if isinstance(outcome, ValidatedAdapter))):
            try:
                if change.is_dry:
                    await self._store.check_commit([item.staged for item in new], change.quota)
                    break
                generation = await self._commit_once(new, change, held)
            except AdapterRefused as exc:  # another tenant owns this public name: continue without the adapter
                refused = [item for item in new if item.staged.ref.name == exc.name]
                if not refused:
                    raise
                outcomes = [exc if outcome in refused else outcome for outcome in outcomes]
                continue
            except VersionConflict:
                if change.is_dry:
                    break  # a publish takes the change over
                num_conflicts += 1
                if num_conflicts > _MAX_SWAPS or change.precondition == "live":
                    raise
                again = await self._store.take_over([item.staged for item in new])
                held += [item for item, old in zip(again, new, strict=True) if item.lease != old.staged.lease]
                taken = await self._validator.restaged(new, again)
                if not taken:
                    raise
                outcomes = [taken.get(id(outcome), outcome) for outcome in outcomes]
                continue
            logger.info("published %d adapters at generation %d", len(new), generation)
            return generation, outcomes
        return 0, outcomes

    async def _commit_once(self, new: Sequence[ValidatedAdapter], change: Change, held: list[Staged]) -> int:
        """Commit these versions and return the generation. See `_commit` for `held`."""
        try:
            return await self._store.commit(
                [item.staged for item in new],
                [None if item.embedded is None else item.embedded.embedding for item in new],
                [item.shift for item in new],
                change.actor,
                change.precondition,
                change.quota,
                uuid4().hex,  # a replica that died meanwhile may have committed
            )
        except (AdapterRefused, AdapterNotFound, QuotaExceeded, VersionConflict):
            raise
        except BaseException:
            held.clear()  # they may be live
            raise

    async def _follow_encoder(
        self, generation: int, outcomes: list[Outcome], change: Change
    ) -> tuple[int, list[Outcome]]:
        """Embed and commit again the adapters that a reindex overtook, because `auto` would not find them otherwise.

        The adapters are live in any case: after a failure, the next reindex embeds them. Their outcomes have no
        embedding then.
        """
        active = None
        try:
            for is_last in (*[False] * _MAX_SWAPS, True):
                found = [item.embedded for item in outcomes if isinstance(item, ValidatedAdapter)]
                encoders = {embedded.embedding.encoder for embedded in found if embedded is not None}
                active = await self._store.active_encoder() if encoders else None
                if active is None or encoders == {active}:
                    return generation, outcomes
                if not is_last:
                    await self.catch_up(generation)
                    again = await self._validator.embed_again(outcomes)
                    generation, outcomes = await self._commit(again, Change(change.actor, precondition="live"), [])
            logger.error(
                "auto does not find adapters live at generation %d, which a reindex overtook:"
                " run `loraretriever pool reindex` again",
                generation,
            )
        except Exception:
            logger.exception("adapters live at generation %d may lack an embedding by the new encoder", generation)
        return generation, [item if active is None else _found_by(active, item) for item in outcomes]


def _found_by(encoder: str, outcome: Outcome) -> Outcome:
    """Return the outcome, without an embedding by another encoder."""
    if isinstance(outcome, ValidatedAdapter) and outcome.embedded and outcome.embedded.embedding.encoder != encoder:
        return replace(outcome, embedded=None)
    return outcome


async def _clean_up(what: str, work: Awaitable[None]) -> None:
    """Wait for `work`, and log its failure: gc deletes what it leaves."""
    try:
        await work
    except Exception:
        logger.warning("%s are left to gc", what, exc_info=True)
