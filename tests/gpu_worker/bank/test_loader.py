"""Fetching adapter weights: once each, within a budget, with isolated failures."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
import torch

from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule
from gpu_worker.bank.loader import AdapterLoader
from gpu_worker.errors import AdapterLoadFailed, AdapterLost, AdapterUnfit
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import HeldExecutor
from tests.tiny import InlineExecutor

WEIGHTS_BYTES = 2 * 4 * 8 * 4  # a and bt, rank 4, 8 wide, float32


class Store:
    """Counts fetches. A digest that starts with `slow` arrives when the test sets its future."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.is_down = False
        self.slow: dict[str, Future[AdapterWeights]] = {}

    def fetch(self, digest: str) -> Future[AdapterWeights]:
        self.fetched.append(digest)
        fetched: Future[AdapterWeights] = Future()
        if self.is_down:
            fetched.set_exception(ConnectionError("no route to the store"))
        elif digest.startswith("slow"):
            self.slow[digest] = fetched
        else:
            fetched.set_result(AdapterWeights(digest, {}))
        return fetched


def to_device_layout(weights: AdapterWeights) -> DeviceAdapter:
    return DeviceAdapter(weights.weights_digest, {"m": DeviceModule(torch.zeros(4, 8), torch.zeros(4, 8))})


def loader_of(
    store: Store,
    *,
    executor: Executor | None = None,
    to_device_layout: Callable[[AdapterWeights], DeviceAdapter] = to_device_layout,
    on_done: Callable[[], None] = lambda: None,
    budget_bytes: int = 1 << 20,
) -> AdapterLoader:
    return AdapterLoader(
        store.fetch,
        to_device_layout=to_device_layout,
        executor=executor or InlineExecutor(),
        budget_bytes=budget_bytes,
        on_done=on_done,
    )


def test_many_requests_share_one_fetch() -> None:
    store, executor = Store(), HeldExecutor()
    loader = loader_of(store, executor=executor)
    futures = [loader.load("a") for _ in range(5)]
    assert not futures[0].done(), "the conversion happens on the executor"
    executor.release()
    assert {id(future.result(0)) for future in futures} == {id(loader.load("a").result(0))}
    assert store.fetched == ["a"]


def test_a_failed_fetch_fails_its_future_and_the_next_request_retries() -> None:
    store, events = Store(), []
    loader = loader_of(store, on_done=lambda: events.append("done"))
    store.is_down = True
    error = loader.load("a").exception(0)
    assert isinstance(error, AdapterLoadFailed) and isinstance(error.__cause__, ConnectionError)
    assert "no route" not in str(error), "what went wrong inside is not the client's to read"
    assert loader.cached_bytes == 0
    store.is_down = False
    assert loader.load("a").result(0).weights_digest == "a"
    assert store.fetched == ["a", "a"]
    assert events == ["done", "done"], "a failure notifies the engine too"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AdapterUnfit("the base model has no module 'm'"), AdapterUnfit),
        (KeyError("m"), AdapterLost),
        (MemoryError(), AdapterLoadFailed),
        (RuntimeError("CUDA error: out of memory"), AdapterLoadFailed),
    ],
)
def test_an_adapter_that_never_loads_is_unfit_or_lost_and_not_cached(error: Exception, kind: type[Exception]) -> None:
    def refuse(weights: AdapterWeights) -> DeviceAdapter:
        raise error

    loader = loader_of(Store(), to_device_layout=refuse)
    assert type(loader.load("a").exception(0)) is kind
    assert loader.cached_bytes == 0


def test_a_load_is_done_before_the_engine_is_notified() -> None:
    seen: list[bool] = []
    executor = HeldExecutor()
    loader = loader_of(Store(), executor=executor, on_done=lambda: seen.append(future.done()))
    future = loader.load("a")
    executor.release()
    assert seen == [True]


def test_the_least_recently_used_weights_leave_a_full_cache_first() -> None:
    store = Store()
    loader = loader_of(store, budget_bytes=2 * WEIGHTS_BYTES)
    for digest, num_cached in (("a", 1), ("b", 2), ("a", 2), ("c", 2)):  # a was used after b
        loader.load(digest)
        assert loader.cached_bytes == num_cached * WEIGHTS_BYTES
    loader.load("a")
    assert store.fetched == ["a", "b", "c"]
    loader.load("b")
    assert store.fetched == ["a", "b", "c", "b"]


def test_only_cached_weights_are_found_and_finding_them_is_a_use() -> None:
    store = Store()
    loader = loader_of(store, budget_bytes=2 * WEIGHTS_BYTES)
    loader.load("slow")
    assert loader.find("slow") is None and loader.find("a") is None and store.fetched == ["slow"]
    found = loader.load("a")
    loader.load("b")
    assert loader.find("a") is found
    loader.load("c")
    assert loader.find("b") is None and loader.find("a") is found


def test_a_load_in_progress_is_never_evicted_or_discarded() -> None:
    store = Store()
    loader = loader_of(store, budget_bytes=1)
    slow = loader.load("slow")
    loader.load("quick")
    loader.discard("slow")
    assert loader.load("slow") is slow and loader.loading == {"slow"}
    store.slow["slow"].set_result(AdapterWeights("slow", {}))
    assert slow.result(0).weights_digest == "slow"
    assert loader.cached_bytes == WEIGHTS_BYTES, "weights larger than the budget can be used"
    assert store.fetched == ["slow", "quick"] and loader.loading == frozenset()


def test_stalled_fetches_block_no_thread_of_the_others() -> None:
    store = Store()
    with ThreadPoolExecutor(1) as executor:
        loader = loader_of(store, executor=executor)
        stalled = [loader.load(f"slow-{i}") for i in range(10)]
        assert loader.load("quick").result(120).weights_digest == "quick"
        assert not any(future.done() for future in stalled)
        assert loader.loading == {f"slow-{i}" for i in range(10)}


def test_the_fetchs_message_reaches_the_client() -> None:
    store = Store()
    future = loader_of(store).load("slow")
    store.slow["slow"].set_exception(AdapterLoadFailed("the adapter was withdrawn"))
    assert str(future.exception(0)) == "the adapter was withdrawn"


def test_a_fetch_that_cannot_start_fails_only_its_load() -> None:
    def fetch(digest: str) -> Future[AdapterWeights]:
        raise RuntimeError("the event loop is closed")

    woken: list[str] = []
    loader = AdapterLoader(
        fetch,
        to_device_layout=to_device_layout,
        executor=InlineExecutor(),
        budget_bytes=1,
        on_done=lambda: woken.append("woken"),
    )
    assert isinstance(loader.load("a").exception(0), AdapterLoadFailed)
    assert loader.loading == frozenset() and woken == ["woken"]


def test_discarded_weights_take_no_memory_and_are_fetched_again() -> None:
    store = Store()
    loader = loader_of(store)
    loader.load("a"), loader.load("b")
    loader.discard("a")
    loader.discard("never loaded")
    assert loader.cached_bytes == WEIGHTS_BYTES
    assert loader.load("a").result(0).weights_digest == "a"
    assert store.fetched == ["a", "b", "a"]


def test_after_the_executor_has_shut_down_a_load_fails_at_once() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    loader = loader_of(Store(), executor=executor)
    for _ in range(2):
        assert isinstance(loader.load("a").exception(0), AdapterLoadFailed)
