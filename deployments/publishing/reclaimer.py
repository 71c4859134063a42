"""Frees what a withdrawal or an update left without a name: bank rows, caches, object store, blobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.calls.background_tasks import Background
from lora_store import AdapterRecord, StoreUnavailable

logger = logging.getLogger(__name__)

_BROADCAST_TIMEOUT_S = 10.0
_ROUND_S = 0.5
_PAUSE_S = 5.0  # after a part of the server failed


class Reclaimer:
    """Waits until no Worker needs the weights any more, then removes them. What a crash cuts short is `gc`'s work."""

    def __init__(
        self,
        store: DeploymentHandle,
        worker: DeploymentHandle,
        background: Background,
        *,
        longest_request_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store, self._worker, self._background = store, worker, background
        self._max_rounds = max(1, int(longest_request_s / _ROUND_S))
        self._sleep = sleep

    def release(self, records: Iterable[AdapterRecord]) -> None:
        """Free in the background what of these no kept version refers to."""
        weights = sorted({record.weights_digest for record in records})
        blobs = sorted({digest for record in records for digest in record.blobs})
        if blobs:
            self._background.start(self._release(weights, blobs), f"freeing {len(blobs)} blobs")

    async def _release(self, weights: Sequence[str], blobs: Sequence[str]) -> None:
        for _ in range(self._max_rounds):
            try:
                await self._release_once(weights, blobs)
                return
            except (StoreUnavailable, RayActorError, DeploymentUnavailableError) as exc:
                logger.warning("freeing %d blobs is tried again: %s", len(blobs), exc)
                await self._sleep(_PAUSE_S)
        logger.error("%d blobs are left to gc", len(blobs))

    async def _release_once(self, weights: Sequence[str], blobs: Sequence[str]) -> None:
        orphans = await self._store.unreferenced.remote(blobs)
        if not orphans:
            return
        orphaned = [digest for digest in weights if digest in orphans]
        await self._until_true(self._worker, "forget", orphaned)
        removed = await self._store.sweep.remote(orphans)  # looks again: they may have been published meanwhile
        await self._until_true(self._store, "release", orphans)
        await self._all_say_true(self._worker, "forget", orphaned)  # what a request planned before loaded until now
        logger.info("removed %d of %d blobs that nothing refers to", len(removed), len(orphans))

    async def _until_true(self, handle: DeploymentHandle, method: str, digests: Sequence[str]) -> None:
        for _ in range(self._max_rounds):
            if await self._all_say_true(handle, method, digests):
                return
            await self._sleep(_ROUND_S)
        logger.warning("a replica still holds some of %d digests that are removed", len(digests))

    async def _all_say_true(self, handle: DeploymentHandle, method: str, digests: Sequence[str]) -> bool:
        """Whether every replica says so; one that has died holds nothing."""
        response = handle.broadcast(method, digests)
        try:
            answers = await response.results_async(timeout_s=_BROADCAST_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError as exc:
            if handle is self._worker:
                return True  # none runs: scaled to zero, or all have died
            logger.warning("%s is asked again: %s", method, exc)
            return False
        except TimeoutError as exc:
            logger.warning("%s is asked again: %s", method, exc)
            return False
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, RayActorError):
                logger.warning("a replica could not %s", method, exc_info=answer)
        return all(answer is True or isinstance(answer, RayActorError) for answer in answers)
