"""Free resources that a withdrawal or an update left unreferenced: bank rows, caches, objects, blobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.background import Background
from deployments.calls.catalogue_clients import StoreClient
from deployments.calls.worker_client import Workers
from lora_store import AdapterRecord, LoraStoreError, StoreUnavailable

logger = logging.getLogger(__name__)

_BROADCAST_TIMEOUT_S = 10.0
_ROUND_S = 0.5
_EXPIRE_EVERY_S = 2.0  # an expired adapter is refused at once, and freed within this time
_PAUSE_S = 5.0  # after an error of a part of the server

Broadcast = Callable[[Collection[str], float], Awaitable[Sequence[bool | BaseException]]]


async def withdraw_expired(
    expire: Callable[[], Awaitable[object]], sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Call `expire` every few seconds until cancelled, also after an error. Nothing starts it again."""
    while True:
        await sleep(_EXPIRE_EVERY_S)
        try:
            await expire()
        except (LoraStoreError, RayActorError, DeploymentUnavailableError) as exc:
            logger.warning("expired adapters are not withdrawn yet, retrying: %s", exc)
        except Exception:
            logger.exception("expired adapters are not withdrawn yet, retrying")


class Reclaimer:
    """Waits until no Worker needs the weights any more, then deletes them. After a crash `gc` deletes the rest."""

    def __init__(
        self,
        store: StoreClient,
        workers: Workers,
        background: Background,
        *,
        longest_request_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store, self._workers, self._background = store, workers, background
        self._max_rounds = max(1, int(longest_request_s / _ROUND_S))
        self._sleep = sleep

    def reclaim(self, records: Iterable[AdapterRecord]) -> None:
        """Free in the background those blobs of these versions that no kept version uses."""
        weights = sorted({record.weights_digest for record in records})
        blobs = sorted({digest for record in records for digest in record.blobs})
        if blobs:
            self._background.start(self._reclaim(weights, blobs), f"freeing {len(blobs)} blobs")

    async def _reclaim(self, weights: Sequence[str], blobs: Sequence[str]) -> None:
        for _ in range(self._max_rounds):
            try:
                await self._reclaim_once(weights, blobs)
                return
            except (StoreUnavailable, RayActorError, DeploymentUnavailableError) as exc:
                logger.warning("freeing %d blobs failed, retrying: %s", len(blobs), exc)
                await self._sleep(_PAUSE_S)
        logger.error("%d blobs are left to gc", len(blobs))

    async def _reclaim_once(self, weights: Sequence[str], blobs: Sequence[str]) -> None:
        orphans = await self._store.unreferenced(blobs)
        if not orphans:
            return
        orphaned = [digest for digest in weights if digest in orphans]
        await self._until_done("forget", self._forget_everywhere, orphaned)
        removed = await self._store.sweep(orphans)  # checks again: they may have been published meanwhile
        await self._until_done("release", self._release_everywhere, orphans)
        await self._forget_everywhere(orphaned)  # requests with earlier plans may have loaded them until now
        logger.info("deleted %d of %d unreferenced blobs", len(removed), len(orphans))

    async def _until_done(
        self, what: str, step: Callable[[Sequence[str]], Awaitable[bool]], digests: Sequence[str]
    ) -> None:
        for _ in range(self._max_rounds):
            if await step(digests):
                return
            await self._sleep(_ROUND_S)
        logger.warning("%s: a replica still holds some of %d digests to remove", what, len(digests))

    async def _forget_everywhere(self, digests: Sequence[str]) -> bool:
        """Return whether no Worker holds any of these weights. True if no Worker runs."""
        return await _all_true("forget", self._workers.broadcast_forget, digests, without_replica=True)

    async def _release_everywhere(self, digests: Sequence[str]) -> bool:
        """Return whether no Store replica keeps any of these in Ray's object store."""
        return await _all_true("release", self._store.broadcast_release, digests, without_replica=False)


async def _all_true(what: str, broadcast: Broadcast, digests: Sequence[str], *, without_replica: bool) -> bool:
    """Return whether every replica answers True. A replica that died holds nothing and counts as True."""
    try:
        answers = await broadcast(digests, _BROADCAST_TIMEOUT_S)
    except DeploymentUnavailableError as exc:
        if without_replica:
            return True  # scaled to zero, or all have died
        logger.warning("%s: retrying: %s", what, exc)
        return False
    except TimeoutError as exc:
        logger.warning("%s: retrying: %s", what, exc)
        return False
    for answer in answers:
        if isinstance(answer, Exception) and not isinstance(answer, RayActorError):
            logger.warning("a replica could not %s", what, exc_info=answer)
    return all(answer is True or isinstance(answer, RayActorError) for answer in answers)
