"""Fetching adapter weights: once each, within a budget, failures kept apart."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

import torch

from gpu_worker.errors import AdapterLoadFailed, AdapterUnfit
from gpu_worker.loader import AdapterLoader
from lora_store.adapter import AdapterWeights, ModuleWeights
from tests.gpu_worker.driving import HeldExecutor
from tests.tiny import InlineExecutor

WEIGHTS_BYTES = 2 * 4 * 8 * 4  # lora_a and lora_b, rank 4, 8 wide, float32


class Store:
    """Knows every digest that does not start with `missing`; counts what was fetched."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.is_down = False

    def fetch(self, digest: str) -> AdapterWeights:
        self.fetched.append(digest)
        if self.is_down:
            raise ConnectionError("no route to the store")
        return AdapterWeights(digest, {"m": ModuleWeights(torch.zeros(4, 8), torch.zeros(8, 4), 1.0)})


def loader_of(
    store: Store,
    *,
    executor: Executor | None = None,
    check: Callable[[AdapterWeights], None] = lambda weights: None,
    on_done: Callable[[], None] = lambda: None,
    budget_bytes: int = 1 << 20,
) -> AdapterLoader:
    return AdapterLoader(
        store.fetch, check=check, executor=executor or InlineExecutor(), budget_bytes=budget_bytes, on_done=on_done
    )


def test_many_requests_share_one_fetch() -> None:
    store, executor = Store(), HeldExecutor()
    loader = loader_of(store, executor=executor)
    futures = [loader.load("a") for _ in range(5)]
    assert store.fetched == [] and not futures[0].done(), "loading happens on the executor"
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
    assert events == ["done", "done"], "a failure wakes the engine too"


def test_an_unfit_adapter_keeps_its_own_error_and_is_not_cached() -> None:
    def refuse(weights: AdapterWeights) -> None:
        raise AdapterUnfit("the base model has no module 'm'")

    loader = loader_of(Store(), check=refuse)
    assert isinstance(loader.load("a").exception(0), AdapterUnfit)
    assert loader.cached_bytes == 0


def test_a_finished_load_is_done_before_the_engine_is_woken() -> None:
    seen: list[bool] = []
    executor = HeldExecutor()
    loader = loader_of(Store(), executor=executor, on_done=lambda: seen.append(future.done()))
    future = loader.load("a")
    executor.release()
    assert seen == [True]


def test_memory_stays_within_the_budget() -> None:
    loader = loader_of(Store(), budget_bytes=3 * WEIGHTS_BYTES)
    for i in range(10):
        loader.load(str(i)).result(0)
        assert loader.cached_bytes == min(i + 1, 3) * WEIGHTS_BYTES


def test_the_least_recently_used_weights_go_first() -> None:
    store = Store()
    loader = loader_of(store, budget_bytes=2 * WEIGHTS_BYTES)
    for digest in ("a", "b", "a", "c"):  # a was used after b
        loader.load(digest)
    loader.load("a")
    assert store.fetched == ["a", "b", "c"]
    loader.load("b")
    assert store.fetched == ["a", "b", "c", "b"]


def test_weights_larger_than_the_budget_still_serve() -> None:
    store = Store()
    loader = loader_of(store, budget_bytes=1)
    assert loader.load("a").result(0).weights_digest == "a"
    assert loader.load("b").result(0).weights_digest == "b"
    assert loader.cached_bytes == WEIGHTS_BYTES


def test_a_load_in_progress_is_never_evicted() -> None:
    store, executor = Store(), HeldExecutor()
    loader = loader_of(store, executor=executor, budget_bytes=1)
    slow = loader.load("slow")
    [held], executor.held = executor.held, []
    loader.load("quick")
    executor.release()
    assert loader.load("slow") is slow
    held()
    assert slow.result(0).weights_digest == "slow"
    assert store.fetched == ["quick", "slow"]


def test_after_the_executor_has_shut_down_a_load_fails_at_once() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    loader = loader_of(Store(), executor=executor)
    for _ in range(2):
        assert isinstance(loader.load("a").exception(0), AdapterLoadFailed)
