"""How the pool changes, over the handles. Publish: stage, embed and probe, commit, then every Retriever catches up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.background import Background
from deployments.errors import VersionNotKept
from deployments.examiner import Examined, Examiner, Outcome
from deployments.releaser import Releaser
from deployments.uploads import FolderUpload
from lora_store import AdapterNotFound, AdapterRecord, AdapterRef, AdapterRefused, Key, Staged, Withdrawn
from retriever_svc import Candidate

logger = logging.getLogger(__name__)

CATCH_UP_TIMEOUT_S = 5.0
_MIN_DIGEST_CHARS = 8
_MAX_SWAPS = 3  # of the encoder during one publish


@dataclass(frozen=True, slots=True)
class Published:
    """One adapter that is live. `ready` Retriever replicas route to it already, `behind` ones do not yet."""

    ref: AdapterRef
    generation: int
    ready: int
    behind: int
    found_by_auto: bool  # False: it came without samples, and only its name reaches it
    probe_shift: float | None
    neighbours: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """Adapters that are gone. `behind` Retriever replicas may still route to them."""

    names: tuple[str, ...]
    generation: int
    ready: int
    behind: int


class Publisher:
    """The only path by which adapters become live, and cease to be. What has begun ends even if its caller leaves."""

    def __init__(
        self,
        store: DeploymentHandle,
        retriever: DeploymentHandle,
        worker: DeploymentHandle,
        *,
        background: Background,
        releaser: Releaser,
    ) -> None:
        self._store, self._retriever, self._worker = store, retriever, worker
        self._examiner = Examiner(retriever, worker)
        self._background, self._releaser = background, releaser

    async def publish(self, uploads: Sequence[FolderUpload], actor: str) -> list[Published | Exception]:
        """Publish all that can be, in one commit; what cannot has its error in its place. What is live stays as it is.

        Raises: what the Retriever or the Store says of the batch as a whole; then nothing of it is visible or kept.
        """
        return await self._background.run(self._publish(uploads, actor))

    async def rollback(self, key: Key, digest: str | None, actor: str) -> Published:
        """Publish a kept version again: the one before the live one, or the one whose digest begins with `digest`.

        Raises: AdapterNotFound, VersionNotKept, and what `publish` has for it.
        """
        return await self._background.run(self._rollback(key, digest, actor))

    async def withdraw(self, tenant: str, names: Sequence[str], actor: str) -> Removed:
        """All of `names` with all their versions are gone, or none; what they held is freed in the background.

        Raises: AdapterNotFound, VersionConflict, StoreUnavailable.
        """
        return await self._background.run(self._withdraw(tenant, names, actor))

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

    async def _publish(self, uploads: Sequence[FolderUpload], actor: str) -> list[Published | Exception]:
        module_shapes = await self._worker.module_shapes.remote()
        staging = [self._store.stage.remote(upload, module_shapes) for upload in uploads]
        return await self._make_live(await asyncio.gather(*staging, return_exceptions=True), actor)

    async def _rollback(self, key: Key, digest: str | None, actor: str) -> Published:
        kept = (await self._store.versions.remote([key])).get(key, ())
        if not kept:
            raise AdapterNotFound(key[1])
        staged = await self._store.restage.remote(_kept_version(kept, digest))
        [outcome] = await self._make_live([staged], actor)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _withdraw(self, tenant: str, names: Sequence[str], actor: str) -> Removed:
        withdrawn: Withdrawn = await self._store.withdraw.remote(tenant, names, actor)
        ready, behind = await self.catch_up(withdrawn.generation)
        self._releaser.release(withdrawn.records)
        logger.info("withdrew %d adapters at generation %d", len(names), withdrawn.generation)
        return Removed(tuple(names), withdrawn.generation, ready, behind)

    async def _make_live(self, staged: Sequence[Staged | BaseException], actor: str) -> list[Published | Exception]:
        held = [item for item in staged if isinstance(item, Staged)]
        older: Mapping[Key, tuple[AdapterRecord, ...]] = {}
        committed: set[int] = set()
        try:
            older = await self._store.versions.remote([(item.ref.tenant, item.ref.name) for item in held])
            active = await self._store.active_encoder.remote()
            live = {kept[0].ref: kept[0] for kept in older.values() if _is_found(kept[0], active)}
            outcomes = await self._examiner.examine(staged, live)
            generation, outcomes = await self._commit(outcomes, actor)
            generation, outcomes = await self._follow_encoder(generation, outcomes, actor)
            committed = {id(outcome.staged) for outcome in outcomes if isinstance(outcome, Examined)}
        finally:
            unused = [item for item in held if id(item) not in committed]
            await self._discard(unused)
            pushed_out = [record for versions in older.values() for record in versions] if committed else []
            self._releaser.release([*[item.record for item in unused], *pushed_out])
        generation = max([generation, *[record.generation for record in live.values()]])
        ready, behind = await self.catch_up(generation) if generation else (0, 0)
        return [_published(outcome, generation, ready, behind) for outcome in outcomes]

    async def _commit(self, outcomes: list[Outcome], actor: str) -> tuple[int, list[Outcome]]:
        """(generation at which all that is new is live, 0 without any; the outcomes, a name that is taken refused)."""
        while new := list(dict.fromkeys(outcome for outcome in outcomes if isinstance(outcome, Examined))):
            try:
                generation: int = await self._store.commit.remote(
                    [item.staged for item in new],
                    [None if item.embedded is None else item.embedded.embedding for item in new],
                    [item.shift for item in new],
                    actor,
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

    async def _follow_encoder(self, generation: int, outcomes: list[Outcome], actor: str) -> tuple[int, list[Outcome]]:
        """What a reindex overtook is embedded by its encoder and committed once more: else `auto` would miss it."""
        for _ in range(_MAX_SWAPS):
            embedded = [item for item in outcomes if isinstance(item, Examined) and item.embedded is not None]
            active = await self._store.active_encoder.remote() if embedded else None
            if all(active in (None, item.encoder) for item in embedded):
                break
            await self.catch_up(generation)
            outcomes = await self._examiner.embed_again(outcomes)
            generation, outcomes = await self._commit(outcomes, actor)
        return generation, outcomes

    async def _discard(self, staged: Sequence[Staged]) -> None:
        if not staged:
            return
        try:
            await self._store.discard.remote(staged)
        except Exception:
            logger.warning("what was staged of %d adapters is left to gc", len(staged), exc_info=True)


def _is_found(record: AdapterRecord, active: str | None) -> bool:
    """Whether the encoder in force embedded it, or there is nothing to embed."""
    return record.samples_digest is None or active in (None, record.encoder)


def _kept_version(kept: Sequence[AdapterRecord], digest: str | None) -> AdapterRecord:
    """The version to go back to; `kept` comes newest first. Raises: VersionNotKept."""
    if digest is None:
        matching = kept[1:2]
    else:
        long_enough = len(digest) >= _MIN_DIGEST_CHARS
        matching = [record for record in kept if long_enough and record.ref.digest.startswith(digest)]
    if len(matching) != 1:
        raise VersionNotKept(kept[0].ref.name, digest, [record.ref.digest for record in kept])
    return matching[0]


def _published(outcome: Outcome, generation: int, ready: int, behind: int) -> Published | Exception:
    if isinstance(outcome, Examined):
        found = outcome.embedded is not None
        neighbours = outcome.embedded.neighbours if outcome.embedded is not None else ()
        return Published(outcome.staged.ref, generation, ready, behind, found, outcome.shift, neighbours)
    if isinstance(outcome, AdapterRecord):
        found = outcome.encoder is not None
        return Published(outcome.ref, outcome.generation, ready, behind, found, outcome.probe_shift, ())
    assert isinstance(outcome, Exception)
    return outcome
