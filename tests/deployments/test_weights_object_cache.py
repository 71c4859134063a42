from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from deployments.calls.catalogue_clients import Buffer
from deployments.weights import ObjectCache
from lora_store import StoreUnavailable

PART = 4
BLOBS = {name: bytes([place]) * 10 for place, name in enumerate("abcd")} | {"large": bytes(30)}


class Loads:
    """A cache over `BLOBS`, in parts of 4 bytes, that counts loads. A reference is the tuple of a part's bytes."""

    def __init__(self, budget_bytes: int, load: Callable[[str], bytes] | None = None) -> None:
        self.loaded: list[str] = []
        self.put: list[Buffer] = []
        self.num_read = 0
        self._load = load or BLOBS.__getitem__
        self.cache: ObjectCache[tuple[int, ...]] = ObjectCache(self._count, self._put, budget_bytes)

    def _count(self, digest: str) -> Iterator[Buffer]:
        self.loaded.append(digest)
        data = np.frombuffer(self._load(digest), np.uint8)
        for start in range(0, len(data), PART):
            assert len(self.put) == self.num_read, "a part was read before the one before it was put"
            self.num_read += 1
            yield data[start : start + PART]

    def _put(self, buffer: Buffer) -> tuple[int, ...]:
        self.put.append(buffer)
        return tuple(buffer.tolist())


def whole(refs: tuple[tuple[int, ...], ...]) -> bytes:
    return b"".join(map(bytes, refs))


def get(loads: Loads, *digests: str) -> None:
    async def run() -> None:
        for digest in digests:
            assert whole(await loads.cache.get(digest)) == BLOBS[digest]

    asyncio.run(run())


async def held(
    gate: threading.Event, num_callers: int
) -> tuple[Loads, list[asyncio.Task[tuple[tuple[int, ...], ...]]]]:
    """Return a cache whose loads wait for the gate, and callers that wait for one."""

    def load(digest: str) -> bytes:
        assert gate.wait(120)
        return BLOBS[digest]

    loads = Loads(100, load)
    callers = [asyncio.create_task(loads.cache.get("a")) for _ in range(num_callers)]
    await asyncio.sleep(0)
    return loads, callers


def test_the_parts_of_a_kept_blob_are_read_and_put_once_one_after_the_other() -> None:
    loads = Loads(100)
    get(loads, "a", "b", "a")
    assert loads.loaded == ["a", "b"]
    assert [(buffer.dtype, len(buffer)) for buffer in loads.put] == [(np.uint8, size) for size in (4, 4, 2)] * 2


def test_the_least_recently_used_is_dropped_above_the_budget() -> None:
    loads = Loads(20)
    get(loads, "a", "b", "a", "c")
    assert loads.cache.num_bytes == 20
    get(loads, "a", "c")
    assert loads.loaded == ["a", "b", "c"]
    get(loads, "b")
    assert loads.loaded[3:] == ["b"]


@pytest.mark.parametrize("budget_bytes", [0, 9])
def test_a_buffer_larger_than_the_budget_is_returned_and_not_kept(budget_bytes: int) -> None:
    loads = Loads(budget_bytes)
    get(loads, "a", "a")
    assert (loads.loaded, loads.cache.num_bytes) == (["a", "a"], 0)


def test_a_buffer_larger_than_the_budget_evicts_nothing() -> None:
    loads = Loads(20)
    get(loads, "a", "b", "large", "a", "b")
    assert loads.loaded == ["a", "b", "large"]


def test_concurrent_callers_share_one_load_that_survives_a_caller_leaving() -> None:
    async def run() -> None:
        loads, callers = await held(gate := threading.Event(), 3)
        callers[0].cancel()
        await asyncio.wait([callers[0]])
        gate.set()
        assert list(map(whole, await asyncio.gather(*callers[1:]))) == [BLOBS["a"]] * 2
        assert loads.loaded == ["a"]

    asyncio.run(run())


def test_a_failed_load_fails_all_its_callers_and_the_next_call_retries() -> None:
    failures = [StoreUnavailable("down")]

    def load(digest: str) -> bytes:
        if failures:
            raise failures.pop()
        return BLOBS[digest]

    async def run() -> None:
        loads = Loads(100, load)
        first = await asyncio.gather(loads.cache.get("a"), loads.cache.get("a"), return_exceptions=True)
        assert [type(outcome) for outcome in first] == [StoreUnavailable] * 2
        assert whole(await loads.cache.get("a")) == BLOBS["a"]

    asyncio.run(run())


def test_released_buffers_are_loaded_again() -> None:
    loads = Loads(100)
    get(loads, "a", "b")
    loads.cache.release(["a", "unknown"])
    assert loads.cache.num_bytes == 10
    get(loads, "a", "b")
    assert loads.loaded == ["a", "b", "a"]


def test_a_buffer_released_during_its_load_is_not_kept() -> None:
    async def run() -> None:
        loads, [caller] = await held(gate := threading.Event(), 1)
        await asyncio.sleep(0)
        loads.cache.release(["a"])
        gate.set()
        assert whole(await caller) == BLOBS["a"]
        assert loads.cache.num_bytes == 0

    asyncio.run(run())
