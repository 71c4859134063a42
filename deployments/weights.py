"""Adapter weights on their way from the store to an engine: the Store's object cache, and the engine's fetches."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.calls.catalogue_clients import Buffer, WeightsSource
from gpu_worker.errors import AdapterLoadFailed
from lora_store import (
    AdapterNotFound,
    AdapterWeights,
    BlobCorrupted,
    LoraStore,
    StoreUnavailable,
    check_digest,
    weights_in,
)
from lora_store.disk_cache import DiskCache
from lora_store.lru_cache import LruCache

logger = logging.getLogger(__name__)

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")
Ref = TypeVar("Ref")


class ObjectCache(Generic[Ref]):
    """References to the parts of loaded blobs within `budget_bytes`; the least recently used are dropped.

    One load per digest. Use it on one event loop; `load` and `put` run on threads for them only, one part after the
    other, so that a large blob is never whole in this process. A blob larger than the budget is returned but not kept.
    """

    def __init__(
        self, load: Callable[[str], Iterable[Buffer]], put: Callable[[Buffer], Ref], budget_bytes: int
    ) -> None:
        self._load, self._put = load, put
        self._threads = ThreadPoolExecutor(thread_name_prefix="fetch")
        self._kept: LruCache[str, tuple[tuple[Ref, ...], int]] = LruCache(budget_bytes, lambda kept: kept[1])
        self._loading: dict[str, asyncio.Task[tuple[Ref, ...]]] = {}

    @property
    def num_bytes(self) -> int:
        return self._kept.total

    async def get(self, digest: str) -> tuple[Ref, ...]:
        """Return the references. Raises: the error of `load`; the next call tries again."""
        if (kept := self._kept.get(digest)) is not None:
            return kept[0]
        if digest not in self._loading:
            self._loading[digest] = asyncio.create_task(self._fill(digest))
        return await asyncio.shield(self._loading[digest])  # shared: a caller that leaves must not cancel it

    def release(self, digests: Iterable[str]) -> None:
        """Drop these references, also those of loads in progress."""
        for digest in digests:
            self._kept.pop(digest)
            self._loading.pop(digest, None)

    async def _fill(self, digest: str) -> tuple[Ref, ...]:
        task = asyncio.current_task()
        try:
            loop = asyncio.get_running_loop()
            refs, num_bytes = await loop.run_in_executor(self._threads, self._put_loaded, digest)
            if self._loading.get(digest) is task:
                self._kept.put(digest, (refs, num_bytes))
            return refs
        finally:
            if self._loading.get(digest) is task:
                del self._loading[digest]

    def _put_loaded(self, digest: str) -> tuple[tuple[Ref, ...], int]:
        refs, num_bytes = [], 0
        for part in self._load(digest):
            refs.append(self._put(part))
            num_bytes += part.nbytes
        return tuple(refs), num_bytes


class _DamagedInTransit(Exception):
    """The bytes that arrived have another hash. The Store's next answer says whether the stored file is damaged."""


# (error class, whether a retry may help, message for the client); the first match counts. Ray's own messages would show
# internals.
_ERRORS: tuple[tuple[type[Exception], bool, str], ...] = (
    (AdapterNotFound, False, "the adapter was withdrawn"),
    (BlobCorrupted, False, "the stored file is damaged; publish the adapter again"),
    (StoreUnavailable, True, StoreUnavailable.client_message),
    (_DamagedInTransit, True, "they were damaged in transit"),
    (TimeoutError, True, "the adapter store did not answer in time"),
    (BackPressureError, True, "the adapter store is overloaded"),
    (DeploymentUnavailableError, True, "the adapter store is not running"),
    (RayActorError, True, "the adapter store's replica has died"),
    (ObjectLostError, True, "they were lost in transit"),  # the object dies with the replica that created it
    (RayError, True, "the call to the adapter store failed"),
)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and for how long, one fetch is tried."""

    max_tries: int = 5
    first_wait_s: float = 0.1
    longest_wait_s: float = 2.0
    try_timeout_s: float = 30.0  # longer than the Store takes to report a hanging endpoint
    total_timeout_s: float = 60.0

    def wait_s(self, num_tries: int, draw: float) -> float:
        """Return min(longest, first · 2^(num_tries - 1)), reduced by up to a half by `draw` in [0, 1).

        The jitter keeps workers that lost the same replica from retrying at the same moment.
        """
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** (num_tries - 1)) * (1 - draw / 2)


class StoredWeights(WeightsSource):
    """Reads weights from the store without a Store replica."""

    def __init__(self, store: LoraStore) -> None:
        self._store = store

    async def fetch(self, digest: str, *, is_suspect: bool = False) -> Sequence[Buffer]:
        """Return the parts of the stored bytes. Raises: AdapterNotFound, BlobCorrupted, StoreUnavailable."""
        if is_suspect:
            await asyncio.to_thread(self._store.check, digest)
        return await asyncio.to_thread(lambda: list(self._store.read_parts(digest)))


class LoadObserver(Protocol):
    """Receives where weights came from and how long it took, or how long it took to fail."""

    def loaded(self, weights_digest: str, level: str, seconds: float) -> None: ...
    def load_failed(self, weights_digest: str, seconds: float) -> None: ...


class WeightsFetcher:
    """Fetches on the caller's event loop, any number at once. Hashing, decoding and disk reads run on threads."""

    def __init__(
        self,
        store: WeightsSource,
        executor: Executor,
        *,
        cache: DiskCache | None = None,
        observer: LoadObserver | None = None,
        policy: RetryPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store, self._executor, self._cache, self._observer = store, executor, cache, observer
        self._policy = policy or RetryPolicy()
        self._clock, self._sleep, self._draw = clock, sleep, draw

    def start(self, digest: str, loop: asyncio.AbstractEventLoop) -> Future[AdapterWeights]:
        """Start `fetch` on the event loop, from any thread, without the context of the caller.

        Other requests wait for the same weights, and Serve cancels what was called in the context of a client that
        leaves. vLLM's engine starts loads while it handles a request.
        """
        return contextvars.Context().run(lambda: asyncio.run_coroutine_threadsafe(self.fetch(digest), loop))

    async def fetch(self, digest: str) -> AdapterWeights:
        """Return the weights. Raises: AdapterLoadFailed, with a message for the client."""
        began = self._clock()
        try:
            level, weights = await self._load(digest)
        except AdapterLoadFailed:
            if self._observer is not None:
                self._observer.load_failed(digest, self._clock() - began)
            raise
        if self._observer is not None:
            self._observer.loaded(digest, level, self._clock() - began)
        return weights

    async def _load(self, digest: str) -> tuple[str, AdapterWeights]:
        """Return ("disk" or "store", the weights). Raises: AdapterLoadFailed."""
        if self._cache is not None:
            cached = await self._on_thread(_read_cached, digest, self._cache)
            if cached is not None:
                return "disk", cached
        return "store", await self._fetch_with_retries(digest)

    async def _fetch_with_retries(self, digest: str) -> AdapterWeights:
        deadline = self._clock() + self._policy.total_timeout_s
        num_tries, is_suspect = 0, False
        while True:
            num_tries += 1
            try:
                async with asyncio.timeout(min(self._policy.try_timeout_s, deadline - self._clock())):
                    return await self._fetch_once(digest, is_suspect=is_suspect)
            except Exception as exc:
                is_suspect = is_suspect or isinstance(exc, _DamagedInTransit)
                wait_s = self._policy.wait_s(num_tries, self._draw())
                is_last = num_tries == self._policy.max_tries or self._clock() + wait_s >= deadline
                may_help, message = _judge(exc)
                if is_last or not may_help:
                    logger.warning("gave up loading the weights %s after attempt %d", digest, num_tries, exc_info=exc)
                    raise AdapterLoadFailed(f"the weights {digest[:12]} could not be loaded: {message}") from exc
                logger.info("attempt %d to load the weights %s failed: %s", num_tries, digest, message)
            await self._sleep(wait_s)

    async def _fetch_once(self, digest: str, *, is_suspect: bool) -> AdapterWeights:
        parts = await self._store.fetch(digest, is_suspect=is_suspect)
        try:
            return await self._on_thread(self._decode, digest, parts)
        except BlobCorrupted as exc:
            raise _DamagedInTransit(digest) from exc

    async def _on_thread(self, work: Callable[[str, _Given], _Made], digest: str, given: _Given) -> _Made:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, digest, given)

    def _decode(self, digest: str, parts: Sequence[Buffer]) -> AdapterWeights:
        """Return views of the bytes, which the conversion for the bank soon reads. Several parts are joined first."""
        check_digest(digest, parts)
        if self._cache is not None:
            self._cache.put(digest, *[part.data for part in parts])
        return weights_in(digest, parts[0] if len(parts) == 1 else np.concatenate(parts))


def _read_cached(digest: str, cache: DiskCache) -> AdapterWeights | None:
    data = cache.get(digest)
    return None if data is None else weights_in(digest, np.frombuffer(data, np.uint8))


def _judge(error: Exception) -> tuple[bool, str]:
    """Return (whether a retry may help, the message for the client)."""
    cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
    for kind, may_help, message in _ERRORS:
        if isinstance(cause, kind):
            return may_help, message
    return False, "the adapter store failed"
