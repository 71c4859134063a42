"""Cache buffers in Ray's object store and return references to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_store.lru_cache import LruCache

Buffer = NDArray[np.uint8]
Ref = TypeVar("Ref")


class ObjectCache(Generic[Ref]):
    """References to loaded buffers within `budget_bytes`; the least recently used are dropped. One load per digest.

    Use it on one event loop; `load` and `put` run on a thread. A buffer larger than the budget is returned but not
    kept.
    """

    def __init__(self, load: Callable[[str], bytes], put: Callable[[Buffer], Ref], budget_bytes: int) -> None:
        self._load, self._put = load, put
        self._kept: LruCache[str, tuple[Ref, int]] = LruCache(budget_bytes, lambda kept: kept[1])
        self._loading: dict[str, asyncio.Task[Ref]] = {}

    @property
    def num_bytes(self) -> int:
        return self._kept.total

    async def get(self, digest: str) -> Ref:
        """Return the reference. Raises: the error of `load`; the next call tries again."""
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

    async def _fill(self, digest: str) -> Ref:
        task = asyncio.current_task()
        try:
            ref, num_bytes = await asyncio.to_thread(self._put_loaded, digest)
            if self._loading.get(digest) is task:
                self._kept.put(digest, (ref, num_bytes))
            return ref
        finally:
            if self._loading.get(digest) is task:
                del self._loading[digest]

    def _put_loaded(self, digest: str) -> tuple[Ref, int]:
        buffer = np.frombuffer(self._load(digest), dtype=np.uint8)
        return self._put(buffer), buffer.nbytes
