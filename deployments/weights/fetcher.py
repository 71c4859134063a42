"""Brings an adapter's weights to a worker: from its machine's disk cache, else from the Store."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.calls.transport import over_object_store
from gpu_worker.errors import AdapterLoadFailed
from lora_store import AdapterNotFound, AdapterWeights, BlobCorrupted, StoreUnavailable, decode_weights
from lora_store.disk_cache import DiskCache

logger = logging.getLogger(__name__)

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


class _DamagedOnTheWay(Exception):
    """The Store's replica verified these bytes; what arrived hashes to something else."""


# (error class, whether it passes, what the client is told); the first that fits. What Ray says itself names its inside.
_TABLE: tuple[tuple[type[Exception], bool, str], ...] = (
    (AdapterNotFound, False, "the adapter was withdrawn"),
    (BlobCorrupted, False, "what is stored is damaged; the adapter must be published again"),
    (StoreUnavailable, True, StoreUnavailable.client_message),
    (_DamagedOnTheWay, True, "they arrived damaged"),
    (TimeoutError, True, "the adapter store did not answer in time"),
    (BackPressureError, True, "the adapter store has too much to do"),
    (DeploymentUnavailableError, True, "the adapter store is not running"),
    (RayActorError, True, "the adapter store's replica has died"),
    (ObjectLostError, True, "they were lost on the way"),  # they die with the replica that put them there
    (RayError, True, "the adapter store could not be asked"),
)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and for how long, one fetch asks."""

    max_tries: int = 5
    first_wait_s: float = 0.1
    longest_wait_s: float = 2.0
    try_timeout_s: float = 30.0  # longer than the Store takes to call a hanging endpoint unavailable
    total_timeout_s: float = 60.0

    def wait_s(self, num_tries: int, draw: float) -> float:
        """min(longest, first · 2^(num_tries - 1)), of which `draw` in [0, 1) takes away up to a half.

        Workers that lost the same replica do not all come back at once.
        """
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** (num_tries - 1)) * (1 - draw / 2)


class Told(Protocol):
    """Hears where weights came from and how long it took, or that they could not be had."""

    def loaded(self, level: str, seconds: float) -> None: ...
    def load_failed(self) -> None: ...


class WeightsFetcher:
    """Any number of fetches wait on the caller's event loop; hashing, decoding and the disk take threads."""

    def __init__(
        self,
        store: DeploymentHandle,
        executor: Executor,
        *,
        cache: DiskCache | None = None,
        told: Told | None = None,
        policy: RetryPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store, self._executor, self._cache, self._told = store, executor, cache, told
        self._policy = policy or RetryPolicy()
        self._clock, self._sleep, self._draw = clock, sleep, draw

    async def fetch(self, digest: str) -> AdapterWeights:
        """Raises: AdapterLoadFailed, which says why in a client's words."""
        began = self._clock()
        try:
            level, weights = await self._found(digest)
        except AdapterLoadFailed:
            if self._told is not None:
                self._told.load_failed()
            raise
        if self._told is not None:
            self._told.loaded(level, self._clock() - began)
        return weights

    async def _found(self, digest: str) -> tuple[str, AdapterWeights]:
        """Where they were, and the weights. Raises: AdapterLoadFailed."""
        if self._cache is not None:
            cached = await self._on_thread(_read_cached, digest, self._cache)
            if cached is not None:
                return "disk", cached
        return "store", await self._fetch_with_retries(digest)

    async def _fetch_with_retries(self, digest: str) -> AdapterWeights:
        deadline = self._clock() + self._policy.total_timeout_s
        num_tries = 0
        while True:
            num_tries += 1
            try:
                async with asyncio.timeout(min(self._policy.try_timeout_s, deadline - self._clock())):
                    return await self._ask(digest)
            except Exception as exc:
                wait_s = self._policy.wait_s(num_tries, self._draw())
                is_last = num_tries == self._policy.max_tries or self._clock() + wait_s >= deadline
                passes, words = _judge(exc)
                if is_last or not passes:
                    logger.warning("gave up on the weights %s at try %d", digest, num_tries, exc_info=exc)
                    raise AdapterLoadFailed(f"the weights {digest[:12]} could not be loaded: {words}") from exc
                logger.info("try %d for the weights %s failed: %s", num_tries, digest, words)
            await self._sleep(wait_s)

    async def _ask(self, digest: str) -> AdapterWeights:
        [ref] = await over_object_store(self._store).fetch.remote(digest)
        data: NDArray[np.uint8] = await ref
        try:
            return await self._on_thread(self._decode, digest, data)
        except BlobCorrupted as exc:
            raise _DamagedOnTheWay(digest) from exc

    async def _on_thread(self, work: Callable[[str, _Given], _Made], digest: str, given: _Given) -> _Made:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, digest, given)

    def _decode(self, digest: str, data: NDArray[np.uint8]) -> AdapterWeights:
        weights = decode_weights(digest, data)
        if self._cache is not None:
            self._cache.put(digest, data.data)
        return weights


def _read_cached(digest: str, cache: DiskCache) -> AdapterWeights | None:
    data = cache.get(digest)
    return None if data is None else decode_weights(digest, data)


def _judge(error: Exception) -> tuple[bool, str]:
    """(whether asking again may help, what the client is told)."""
    cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
    for kind, passes, words in _TABLE:
        if isinstance(cause, kind):
            return passes, words
    return False, "the adapter store failed"
