"""The queue that both engines share, over a small bank, without an engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future

import pytest
import torch

from gpu_worker.bank.device_layout import DeviceAdapter, to_device_layout
from gpu_worker.bank.loader import AdapterLoader
from gpu_worker.bank.residency import Residency
from gpu_worker.errors import DeadlineExceeded, EngineFull, EngineStopped, WaitedTooLong
from gpu_worker.front.prefix import Prefix
from gpu_worker.front.queue import RequestQueue
from gpu_worker.front.request.request import Delta
from gpu_worker.front.row import Row
from lora_store.adapter import AdapterWeights, ModuleWeights
from tests.clocks import Clock
from tests.gpu_worker.rows import queued_row
from tests.tiny import InlineExecutor, tiny_config

NUM_PLACES = 2


class Store:
    """Bank rows that nobody reads."""

    num_rows = 8

    def write(self, rows: Sequence[int], adapter: DeviceAdapter) -> None: ...
    def free(self, rows: Sequence[int]) -> None: ...
    def move(self, rows: Sequence[int], to: Sequence[int]) -> None: ...
    def swap(self, rows: Sequence[int], others: Sequence[int]) -> None: ...
    def set_active(self, num_rows: int) -> None: ...


class Places:
    """Two places. A row finds as many tokens in the prefix cache as its prompt has, less one."""

    def __init__(self) -> None:
        self.num_free, self.num_freed = NUM_PLACES, 0
        self.forgotten: set[str] = set()
        self.coming: Prefix | None = None  # rows with this one wait

    def is_coming(self, num_tokens: int, prefix: Prefix | None) -> bool:
        return prefix is not None and prefix is self.coming

    def fits(self, num_tokens: int, prefix: Prefix | None) -> bool:
        return self.num_free > 0

    def allocate(self, num_tokens: int, longest_len: int, prefix: Prefix | None) -> int:
        self.num_free -= 1
        return num_tokens - 1

    def num_reused(self, row: int) -> int:
        return row

    def forget(self, digests: Collection[str]) -> None:
        self.forgotten.update(digests)

    def free(self) -> None:
        self.num_free += 1
        self.num_freed += 1


class World:
    """A queue, and the events of its rows."""

    def __init__(self, **changes: object) -> None:
        self.clock, self.places = Clock(100.0), Places()
        self.residency = Residency(Store())
        shapes = {"up": (2, 2)}
        self.loader = AdapterLoader(
            self._fetch,
            to_device_layout=lambda weights: to_device_layout(weights, shapes=shapes, dtype=torch.float32),
            executor=InlineExecutor(),
            budget_bytes=1 << 20,
            on_done=lambda: None,
        )
        parts = changes.pop("parts", iter)
        config = tiny_config("unused", **{"max_wait_s": 10.0, **changes})
        self.queue = RequestQueue(
            config,
            self.loader,
            self.residency,
            self.places,
            parts=parts,
            clock=self.clock,  # type: ignore[arg-type]
        )
        self.events: dict[Row, list[Delta | Exception]] = {}

    def submit(self, adapters: str = "", tenant: str = "local", *, time_left_s: float = math.inf) -> Row:
        row = queued_row(adapters, tenant, number=len(self.events))
        self.events[row] = []
        row.sink = self.events[row].append
        row.deadline = self.clock() + time_left_s
        self.queue.submit(row)
        return row

    def end(self, row: Row) -> None:
        """End a running row, as an engine does."""
        self.queue.end_running(row)
        self.places.free()
        self.residency.unpin(row.weights_digests)
        row.is_pinned = False
        self.queue.drop_forgotten()

    @staticmethod
    def _fetch(digest: str) -> Future[AdapterWeights]:
        fetched: Future[AdapterWeights] = Future()
        fetched.set_result(AdapterWeights(digest, {"up": ModuleWeights(torch.ones(1, 2), torch.ones(2, 1), 1.0)}))
        return fetched


def test_rows_start_in_turn_while_there_are_places() -> None:
    world = World()
    rows = [world.submit() for _ in range(3)]
    world.clock.at += 4.0
    assert world.queue.admit() == rows[:2] == world.queue.running
    assert [row.queued_s for row in rows] == [4.0, 4.0, 0.0]
    assert world.queue.admit() == []
    world.end(rows[0])
    assert world.queue.admit() == [rows[2]]


def test_rows_behind_those_that_wait_for_blocks_start_before_them() -> None:
    world = World()
    prefix = Prefix([1, 2], b"", "", 1)
    world.places.coming = prefix
    rows = [world.submit() for _ in range(4)]
    for row in rows[:2]:
        row.prefix = prefix
    assert world.queue.admit() == rows[2:]
    assert list(world.queue.waiting) == rows[:2]
    world.places.coming = None
    world.end(rows[2])
    assert world.queue.admit() == rows[:1]


def test_only_some_rows_that_wait_for_blocks_are_passed() -> None:
    world = World()
    world.places.coming = prefix = Prefix([1, 2], b"", "", 1)
    for _ in range(17):
        world.submit().prefix = prefix
    world.submit()
    other = world.submit(tenant="other")
    assert world.queue.admit() == [other]


def test_a_full_queue_displaces_the_newest_row_of_the_tenant_with_most() -> None:
    world = World(max_waiting=3)
    many = [world.submit(tenant="many") for _ in range(3)]
    other = world.submit(tenant="other")
    assert isinstance(world.events[many[2]][-1], EngineFull)
    assert set(world.queue.waiting) == {*many[:2], other}
    with pytest.raises(EngineFull, match=r"queue is full \(3 requests\)"):
        world.submit(tenant="many")


def test_overdue_rows_end_and_the_next_time_is_known() -> None:
    world = World()
    running, _ = world.submit(time_left_s=5.0), world.submit(time_left_s=50.0)
    world.queue.admit()
    late, patient = world.submit(time_left_s=3.0), world.submit()
    assert world.queue.next_due == 103.0 and world.queue.end_overdue() == []
    world.clock.at = 103.0
    assert world.queue.end_overdue() == [] and isinstance(world.events[late][-1], DeadlineExceeded)
    assert world.queue.next_due == 105.0
    world.clock.at = 105.0
    [(ended, error)] = world.queue.end_overdue()
    assert ended is running and isinstance(error, DeadlineExceeded)
    assert world.events[running] == [], "the engine ends what it computes"
    assert world.queue.next_due == 110.0
    world.clock.at = 110.0
    assert [row for row, _ in world.queue.end_overdue()] == [running]
    assert isinstance(world.events[patient][-1], WaitedTooLong)
    assert world.queue.next_due == 150.0


def test_weights_to_forget_stay_until_their_last_row_ends() -> None:
    world = World()
    row = world.submit("a")
    world.queue.admit()
    status = world.queue.status(kv_tokens=0, free_kv_tokens=0)
    assert (status.resident, status.active_rows) == ({"a"}, 1) and status.host_cache_bytes > 0
    assert not world.queue.forget(["a", "b"])
    assert world.places.forgotten == {"b"}, "no row uses it"
    assert world.queue.status(kv_tokens=0, free_kv_tokens=0).num_forgetting == 1
    world.end(row)
    status = world.queue.status(kv_tokens=0, free_kv_tokens=0)
    assert (status.num_forgetting, status.host_cache_bytes, status.resident) == (0, 0, frozenset())
    assert world.places.forgotten == {"a", "b"} and world.queue.forget(["a"])


def test_a_name_that_stands_for_several_adapters_counts_as_all_of_them() -> None:
    def split(digests: Iterable[str]) -> Iterator[str]:
        return (part for digest in digests for part in {"f": "ab"}.get(digest, digest))

    world = World(parts=split)
    world.submit("f")
    assert world.queue.expected() == {"a", "b"}
    counters = world.queue.counters
    assert (counters.num_requests, counters.num_fetches) == (1, 2)
    assert not world.queue.forget(["a"]), "the waiting row uses it"
    world.queue.admit()
    world.submit("f")
    assert counters.num_bank_hits == 2


def test_a_probe_is_not_counted_as_a_request() -> None:
    world = World()
    row = queued_row("a")
    row.capture_first_logits = True
    world.queue.submit(row)
    assert world.queue.counters.num_requests == 0


def test_a_requeued_row_starts_first_and_counts_its_cached_tokens_once() -> None:
    world = World()
    row, other, waiting = world.submit("a"), world.submit(), world.submit()
    row.tokens += [1, 2]
    world.queue.admit()
    assert row.num_computed == row.num_cached_tokens == world.queue.counters.num_cached_tokens == 2
    world.queue.running.remove(row)
    world.queue.requeue(row)
    world.places.free()
    assert row.num_computed == 0 and world.queue.counters.num_preemptions == 1
    world.clock.at += 5.0
    assert world.queue.admit() == [row] and world.queue.running == [other, row]
    assert (row.num_computed, row.queued_s) == (2, 0.0) and world.queue.counters.num_cached_tokens == 2
    assert list(world.queue.waiting) == [waiting]


def test_a_row_whose_client_is_gone_is_reported_to_the_engine() -> None:
    def gone(event: object) -> None:
        raise ConnectionError

    world = World()
    row = world.submit()
    assert world.queue.send(row, EngineStopped("x")) and len(world.events[row]) == 1
    row.sink = gone
    assert not world.queue.send(row, EngineStopped("x"))


def test_all_waiting_rows_get_their_error_even_if_releasing_raises() -> None:
    world = World()
    rows = [world.submit("a") for _ in range(NUM_PLACES + 2)]
    for row in world.queue.admit():
        world.queue.running.remove(row)
        world.queue.requeue(row)

    def lost(digests: Sequence[str]) -> None:
        raise RuntimeError("the device is lost")

    world.residency.unpin = lost  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="lost"):
        world.queue.end_all_waiting(EngineStopped("stopped"))
    assert [isinstance(world.events[row][-1], EngineStopped) for row in rows] == [True] * len(rows)
