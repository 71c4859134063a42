"""What requests wait for the bank that others fill, on a virtual clock: each running row makes a token a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

import pytest

from gpu_worker.front.request.request import SamplingParams
from gpu_worker.front.row import Row
from tests.gpu_worker.front.test_queue import World
from tests.gpu_worker.rows import queued_row

STEP_S, MAX_WAIT_S, MAX_LEN, NUM_PLACES = 0.05, 90.0, 4000, 16
WIDE = "stuvwxyz"  # as many adapters of rank 1 as the bank has rows


@dataclass
class Served:
    """A request, with the times at which it was sent and ended; infinite while it has not ended."""

    row: Row
    sent_at: float
    num_new: int
    started_at: float = float("inf")
    ended_at: float = float("inf")

    @property
    def seconds(self) -> float:
        return self.ended_at - self.sent_at

    @property
    def wait_s(self) -> float:
        return self.started_at - self.sent_at


@dataclass
class Traffic:
    """A queue whose rows make tokens, and what was sent to it."""

    world: World = field(default_factory=lambda: World(max_wait_s=MAX_WAIT_S, max_waiting=10_000))
    served: dict[Row, Served] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.world.places.num_free = NUM_PLACES
        self.world.clock.at = 0.0

    def send(self, tenant: str, adapters: str, num_new: int, *, is_open: bool = False) -> Served:
        """Send a request for this many tokens. `is_open`: it does not say how many."""
        row = queued_row(adapters, tenant, number=next(self.numbers))
        row.max_new_tokens = MAX_LEN if is_open else num_new
        row.sampling = replace(SamplingParams(), max_tokens=None if is_open else num_new)
        self.served[row] = Served(row, self.world.clock.at, num_new)
        self.world.queue.submit(row)
        return self.served[row]

    def step(self) -> None:
        self.world.queue.end_overdue()
        for row in self.world.queue.admit():
            self.served[row].started_at = self.world.clock.at
        self.world.clock.at += STEP_S
        for row in list(self.world.queue.running):
            row.tokens.append(0)
            if row.num_new_tokens >= self.served[row].num_new:
                self.served[row].ended_at = self.world.clock.at
                self.world.end(row)

    def of(self, tenant: str) -> list[Served]:
        return [served for served in self.served.values() if served.row.tenant == tenant]


def keep_asking(traffic: Traffic, tenant: str, adapters: str, num_new: int, *, is_open: bool = False) -> None:
    """Send the tenant's next request if its last one has ended or was refused."""
    last = traffic.of(tenant)[-1:]
    waiting, running = traffic.world.queue.waiting, traffic.world.queue.running
    if not any(served.row in waiting or served.row in running for served in last):
        traffic.send(tenant, adapters, num_new, is_open=is_open)


def run(traffic: Traffic, seconds: float, send: Callable[[int], None]) -> None:
    for number in range(round(seconds / STEP_S)):
        send(number)
        traffic.step()


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("wide", ["a", "c"])
def test_short_answers_do_not_wait_for_one_that_waits_for_a_long_answer(wide: str, is_open: bool) -> None:
    """b always has an answer of 25 s; a row as wide as the bank, of another tenant or their own, waits for its end."""
    traffic = Traffic()

    def send(number: int) -> None:
        keep_asking(traffic, "b", "a", 500, is_open=is_open)
        if number % 2 == 0:
            traffic.send("c", "bcd"[number // 2 % 3], 4, is_open=is_open)
        if not any(served.row in traffic.world.queue.waiting for served in wides):
            wides.append(traffic.send(wide, WIDE, 1))

    wides: list[Served] = []
    run(traffic, 150, send)
    short = sorted(served.seconds for served in traffic.of("c") if served.row.adapter_set != tuple(WIDE))
    assert len(short) == 1500 and short[len(short) * 95 // 100] <= 0.5 and short[-20] <= 1.0
    assert all(served.wait_s <= 55 for served in wides[:-2]) and len(wides) >= 4


@pytest.mark.parametrize("tenants", [["a"], ["a", "b", "c"], ["wide"]])
def test_a_wide_row_starts_however_many_small_ones_arrive(tenants: list[str]) -> None:
    """It waits until 50 rows have passed it over, and then for at most two answers of 40 steps."""
    traffic, wides = Traffic(), list[Served]()

    def send(number: int) -> None:
        if number % 3 == 0:
            tenant = tenants[number // 3 % len(tenants)]
            traffic.send(tenant, "abcdefgh"[number % 8], 40, is_open=number % 2 == 0)
        if number == 100:
            wides.append(traffic.send("wide", WIDE, 10))

    run(traffic, 30, send)
    assert wides[0].wait_s <= (50 * 3 + 2 * 40) * STEP_S


def test_a_wide_tenant_that_asks_without_pause_leaves_others_half_of_the_time() -> None:
    """After an answer that fills the bank for 10 s, no row waits for another one for as long."""
    traffic = Traffic()

    def send(number: int) -> None:
        if number % 2 == 0:
            traffic.send("c", "abc"[number % 3], 2 + number % 5)
        keep_asking(traffic, "wide", WIDE, 200)

    run(traffic, 150, send)
    of_c = sorted(served.seconds for served in traffic.of("c"))
    assert of_c[-20] <= 20 and of_c[len(of_c) // 2] <= 5
    wides = traffic.of("wide")
    assert len(wides) >= 7 and all(served.wait_s <= 12 for served in wides[:-1])


def test_rows_wait_for_a_reservation_only_until_its_row_leaves_the_queue() -> None:
    traffic = Traffic()
    traffic.send("b", "a", 3000)
    wide = traffic.send("wide", WIDE, 1)
    run(traffic, 60 * STEP_S, lambda number: traffic.send("c", "b", 1) and None)
    late = traffic.send("b", "c", 3000)
    traffic.step()
    assert late.row in traffic.world.queue.waiting, "it would end after the first row"
    traffic.world.queue.remove(wide.row)
    traffic.step()
    assert late.row in traffic.world.queue.running
