"""A worker's fetches from a Store that fails, stalls, dies midway, or answers."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorUnavailableError, GetTimeoutError, ObjectLostError, OwnerDiedError, RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.calls.catalogue_clients import Buffer, serve_store
from deployments.weights import ObjectCache, RetryPolicy, WeightsFetcher
from gpu_worker.errors import AdapterLoadFailed, AdapterLost
from lora_store import AdapterNotFound, AdapterWeights, BlobCorrupted, ModuleWeights, StoreUnavailable
from lora_store.disk_cache import DiskCache
from lora_store.weights_blob import encode_weights
from tests.fakes import FakeHandle

DIGEST, DATA = encode_weights({"m": ModuleWeights(torch.ones(2, 3), torch.ones(4, 2), 0.5)})
DAMAGED = DATA[:-1] + b"x"


@dataclass(eq=False)
class Ref:
    """An object reference: it yields a read-only buffer, or raises the error of the object."""

    outcome: bytes | Exception

    def __await__(self) -> Generator[Any, None, np.ndarray[Any, Any]]:
        return self._get().__await__()

    async def _get(self) -> np.ndarray[Any, Any]:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return np.frombuffer(self.outcome, dtype=np.uint8)


@dataclass
class Store:
    """One scripted outcome per call, then valid references. Exceptions are raised; events are waited for first."""

    script: list[Ref | Exception | asyncio.Event] = field(default_factory=list)

    async def fetch(self, digest: str, is_suspect: bool) -> list[Ref]:
        outcome = self.script.pop(0) if self.script else Ref(DATA)
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, asyncio.Event):
            await outcome.wait()
            return [Ref(DATA[:50]), Ref(DATA[50:60]), Ref(DATA[60:])]
        return [outcome]


@dataclass
class Clock:
    """A clock that only pauses advance."""

    now_s: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.pauses.append(seconds)


class Fetching:
    """A fetcher over a scripted store, without jitter in its pauses."""

    def __init__(
        self,
        *script: Ref | Exception | asyncio.Event,
        policy: RetryPolicy | None = None,
        cache: DiskCache | None = None,
    ) -> None:
        self.store = FakeHandle(Store(list(script)))
        self.clock = Clock()
        self.fetcher = WeightsFetcher(
            serve_store(self.store),
            ThreadPoolExecutor(1),
            policy=policy,
            cache=cache,
            clock=self.clock,
            sleep=self.clock.sleep,
            draw=lambda: 0.0,
        )

    async def run(self) -> AdapterWeights:
        return await self.fetcher.fetch(DIGEST)

    @property
    def num_calls(self) -> int:
        return len(self.store.called("fetch"))


def assert_good(weights: AdapterWeights) -> None:
    assert weights.weights_digest == DIGEST
    assert weights.modules["m"].scaling == 0.5 and bool((weights.modules["m"].lora_b == 1).all())


async def test_weights_are_fetched_by_a_reference_in_a_list() -> None:
    fetching = Fetching()
    assert_good(await fetching.run())
    assert fetching.store.called("fetch") == [(DIGEST, False)] and fetching.clock.pauses == []
    assert [call.by_reference for call in fetching.store.calls] == [True], (
        "gRPC would keep the object of a reference forever"
    )


async def test_a_fetch_does_not_run_in_the_context_of_the_request_that_needed_it() -> None:
    """Serve cancels the calls that were made in the context of a request whose client leaves."""
    request = contextvars.ContextVar("request", default="none")
    seen = list[str]()

    class Source:
        async def fetch(self, digest: str, *, is_suspect: bool = False) -> list[np.ndarray[Any, Any]]:
            seen.append(request.get())
            return [np.frombuffer(DATA, dtype=np.uint8)]

    request.set("of a client")
    fetcher = WeightsFetcher(Source(), ThreadPoolExecutor(1))
    assert_good(await asyncio.wrap_future(fetcher.start(DIGEST, asyncio.get_running_loop())))
    assert seen == ["none"]


PASSING = {
    "the adapter store cannot be reached; nothing is lost, try again later": StoreUnavailable("connection refused"),
    "the adapter store did not answer in time": TimeoutError(),
    "the adapter store is overloaded": BackPressureError(num_queued_requests=9, max_queued_requests=8),
    "the adapter store is not running": DeploymentUnavailableError(DeploymentID("Store")),
    "the adapter store's replica has died": RayActorError(),
    "its replica is not there": ActorUnavailableError("the actor is unavailable", b"\x01" * 16),
    "the replica died between fetch and get": Ref(OwnerDiedError("ab" * 28, "", "")),
    "they were lost in transit": Ref(ObjectLostError("ab" * 28, "", "")),
    "get gave up": Ref(GetTimeoutError("get timed out")),
    "they were damaged in transit": Ref(DAMAGED),
}


@pytest.mark.parametrize("words", PASSING)
async def test_temporary_failures_are_retried_and_the_fifth_is_reported_plainly(words: str) -> None:
    once, always = Fetching(PASSING[words]), Fetching(*[PASSING[words]] * 9)
    assert_good(await once.run())
    assert once.num_calls == 2 and once.clock.pauses == [0.1]
    with pytest.raises(AdapterLoadFailed) as caught:
        await always.run()
    assert not isinstance(caught.value, AdapterLost)
    if words.startswith(("the adapter store", "they")):
        assert str(caught.value) == f"the weights {DIGEST[:12]} could not be loaded: {words}"
    assert always.num_calls == 5 and always.clock.pauses == [0.1, 0.2, 0.4, 0.8]


async def test_after_damaged_bytes_the_store_is_asked_to_check_its_file() -> None:
    fetching = Fetching(TimeoutError(), Ref(DAMAGED), TimeoutError(), BlobCorrupted(DIGEST, "f" * 64))
    with pytest.raises(AdapterLoadFailed, match="the stored file is damaged; publish the adapter again"):
        await fetching.run()
    assert [is_suspect for _, is_suspect in fetching.store.called("fetch")] == [False, False, True, True]


LASTING = {
    "the adapter was withdrawn": AdapterNotFound(DIGEST),
    "the stored file is damaged; publish the adapter again": BlobCorrupted(DIGEST, "f" * 64),
    "the adapter store failed": KeyError("a mistake in the store"),
}


@pytest.mark.parametrize("words", LASTING)
async def test_permanent_failures_are_reported_at_once(words: str) -> None:
    fetching = Fetching(LASTING[words])
    with pytest.raises(AdapterLost) as caught:
        await fetching.run()
    assert str(caught.value) == f"the weights {DIGEST[:12]} could not be loaded: {words}"
    assert fetching.num_calls == 1


async def test_different_failures_in_sequence_are_survived() -> None:
    fetching = Fetching(*list(PASSING.values())[:4])
    assert_good(await fetching.run())
    assert fetching.num_calls == 5


async def test_no_attempt_starts_after_the_deadline_and_the_last_cause_is_reported() -> None:
    """The third pause would end at 0.7 s."""
    fetching = Fetching(*[StoreUnavailable("no route")] * 9, policy=RetryPolicy(total_timeout_s=0.6))
    with pytest.raises(AdapterLoadFailed, match="the adapter store cannot be reached"):
        await fetching.run()
    assert fetching.num_calls == 3 and fetching.clock.pauses == [0.1, 0.2]


async def test_a_hanging_attempt_ends_and_the_next_may_succeed() -> None:
    fetching = Fetching(asyncio.Event(), policy=RetryPolicy(try_timeout_s=0.2))
    assert_good(await fetching.run())
    assert fetching.num_calls >= 2


def test_pauses_double_up_to_a_limit_and_jitter_takes_up_to_half() -> None:
    policy = RetryPolicy()
    waits = [policy.wait_s(num_tries, 0.0) for num_tries in range(1, 8)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
    assert policy.wait_s(3, 0.5) == pytest.approx(0.3)
    assert policy.wait_s(50, 0.999) > 1.0


async def test_a_caller_that_leaves_ends_its_fetch() -> None:
    fetching = Fetching(asyncio.Event())
    task = asyncio.create_task(fetching.run())
    while fetching.num_calls == 0:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fetching.num_calls == 1


async def test_any_number_of_stalled_fetches_do_not_affect_others() -> None:
    """There is one thread, and twenty fetches stall."""
    heal = asyncio.Event()
    fetching = Fetching(*[heal] * 20)
    stalled = [asyncio.create_task(fetching.run()) for _ in range(20)]
    while fetching.num_calls < 20:
        await asyncio.sleep(0)
    assert_good(await fetching.run())
    assert not any(task.done() for task in stalled)
    heal.set()
    for weights in await asyncio.gather(*stalled):
        assert_good(weights)


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "weights", 10**6)


@pytest.mark.parametrize(
    "spoil",
    [lambda cache: (cache.folder / DIGEST).write_bytes(DAMAGED), lambda cache: cache.discard([DIGEST])],
    ids=["damaged", "evicted"],
)
async def test_an_adapter_is_read_from_disk_or_else_fetched_and_cached_again(
    spoil: Callable[[DiskCache], object], cache: DiskCache
) -> None:
    assert_good(await Fetching(cache=cache).run())
    down = Fetching(*[StoreUnavailable("no route")] * 9, cache=cache)
    assert_good(await down.run())
    assert down.num_calls == 0
    spoil(cache)
    again = Fetching(cache=cache)
    assert_good(await again.run())
    assert again.num_calls == 1 and cache.get(DIGEST) == DATA


async def test_damaged_data_is_not_cached(cache: DiskCache) -> None:
    with pytest.raises(AdapterLoadFailed):
        await Fetching(*[Ref(DAMAGED)] * 9, cache=cache).run()
    assert cache.get(DIGEST) is None


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


async def get(loads: Loads, *digests: str) -> None:
    for digest in digests:
        assert whole(await loads.cache.get(digest)) == BLOBS[digest]


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


async def test_the_parts_of_a_kept_blob_are_read_and_put_once_one_after_the_other() -> None:
    loads = Loads(100)
    await get(loads, "a", "b", "a")
    assert loads.loaded == ["a", "b"]
    assert [(buffer.dtype, len(buffer)) for buffer in loads.put] == [(np.uint8, size) for size in (4, 4, 2)] * 2


@pytest.mark.parametrize("budget_bytes", [0, 9])
async def test_a_buffer_larger_than_the_budget_is_returned_and_not_kept(budget_bytes: int) -> None:
    loads = Loads(budget_bytes)
    await get(loads, "a", "a")
    assert (loads.loaded, loads.cache.num_bytes) == (["a", "a"], 0)


async def test_the_least_recently_used_is_dropped_above_the_budget() -> None:
    loads = Loads(20)
    await get(loads, "a", "b", "a", "c")
    assert loads.cache.num_bytes == 20
    await get(loads, "a", "c")
    assert loads.loaded == ["a", "b", "c"]
    await get(loads, "b", "large", "b", "c")
    assert loads.loaded[3:] == ["b", "large"], "a buffer larger than the budget evicts nothing"


async def test_concurrent_callers_share_one_load_that_survives_a_caller_leaving() -> None:
    loads, callers = await held(gate := threading.Event(), 3)
    callers[0].cancel()
    await asyncio.wait([callers[0]])
    gate.set()
    assert list(map(whole, await asyncio.gather(*callers[1:]))) == [BLOBS["a"]] * 2
    assert loads.loaded == ["a"]


async def test_a_failed_load_fails_all_its_callers_and_the_next_call_retries() -> None:
    failures = [StoreUnavailable("down")]

    def load(digest: str) -> bytes:
        if failures:
            raise failures.pop()
        return BLOBS[digest]

    loads = Loads(100, load)
    first = await asyncio.gather(loads.cache.get("a"), loads.cache.get("a"), return_exceptions=True)
    assert [type(outcome) for outcome in first] == [StoreUnavailable] * 2
    await get(loads, "a")


async def test_released_buffers_are_loaded_again() -> None:
    loads = Loads(100)
    await get(loads, "a", "b")
    loads.cache.release(["a", "unknown"])
    assert loads.cache.num_bytes == 10
    await get(loads, "a", "b")
    assert loads.loaded == ["a", "b", "a"]


async def test_a_buffer_released_during_its_load_is_not_kept() -> None:
    loads, [caller] = await held(gate := threading.Event(), 1)
    await asyncio.sleep(0)
    loads.cache.release(["a"])
    gate.set()
    assert whole(await caller) == BLOBS["a"]
    assert loads.cache.num_bytes == 0
