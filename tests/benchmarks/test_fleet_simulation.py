"""The simulated fleet, compared with cases that can be followed by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.fleet_simulation import Draw, Fleet, Simulation, digest_of


def in_turn(*requests: tuple[int, ...]) -> Draw:
    """Return a draw of these requests, over and over."""
    numbers = itertools.cycle(requests)
    return lambda _: [digest_of(number) for number in next(numbers)]


@pytest.mark.parametrize(("other", "found_in_bank", "served"), [(1, 8, [5, 5]), (3, 0, [0, 10])])
def test_two_workers_with_room_for_one_adapter_each(other: int, found_in_bank: int, served: list[int]) -> None:
    """By their hashes, 0 and 1 have different homes and are loaded once. 0 and 3 have the same and are always loaded.

    The router knows which adapters a worker holds, but not how many it could hold.
    """
    found = Simulation(Fleet(2, 1, 0, 4, 0.001), in_turn((0,), (other,))).run(1.0, 10)
    assert (found.bank, found.host, found.store) == (found_in_bank, 0, 10 - found_in_bank)
    assert found.served == served


def test_one_worker_without_room_for_both_loads_every_time() -> None:
    found = Simulation(Fleet(1, 1, 0, 4, 0.001), in_turn((0,), (1,))).run(1.0, 10)
    assert (found.bank, found.host, found.store, found.served) == (0, 0, 10, [10])
    assert (found.cold_share, found.imbalance) == (1.0, 1.0)


def test_host_memory_keeps_what_the_bank_evicts() -> None:
    """A, B, C, A, B, C in a bank of one and host memory of three: three loads from the store, then none."""
    found = Simulation(Fleet(1, 1, 3, 4, 0.001), in_turn((0,), (1,), (2,))).run(1.0, 9)
    assert (found.bank, found.host, found.store) == (0, 6, 3)


def test_the_least_recently_used_adapter_is_evicted() -> None:
    """A, B, B, C, A in a bank of two: C evicts A, which is loaded again; only the second B is found."""
    found = Simulation(Fleet(1, 2, 0, 4, 0.001), in_turn((0,), (1,), (1,), (2,), (0,))).run(1.0, 5)
    assert (found.bank, found.store) == (1, 4)


def test_a_request_waits_while_the_bank_or_the_rows_are_taken() -> None:
    """Answers take 10 s, and ten requests arrive within about a second. Nothing starts before the first answer ends."""
    by_bank = Simulation(Fleet(1, 1, 0, 4, 10.0), in_turn((0,), (1,))).run(10.0, 10)
    by_rows = Simulation(Fleet(1, 2, 0, 1, 10.0), in_turn((0,), (1,))).run(10.0, 10)
    assert sum(by_bank.served) == sum(by_rows.served) == 1


def test_requests_before_the_warm_ones_are_over_are_not_counted() -> None:
    found = Simulation(Fleet(1, 2, 0, 4, 0.001), in_turn((0,), (1,))).run(1.0, 10, num_warm=4)
    assert (found.bank, found.store, sum(found.served)) == (6, 0, 6)


@pytest.mark.parametrize("num_workers", [2, 8])
def test_the_products_router_loads_less_than_random_queues(num_workers: int) -> None:
    def drawn(chance: random.Random) -> list[str]:
        return [digest_of(int(40 * chance.random() ** 2))]

    fleet = Fleet(num_workers, 40 // num_workers, 0, 16, 0.05)
    affine, other = [Simulation(fleet, drawn, is_affine=is_affine).run(10.0, 300) for is_affine in (True, False)]
    assert affine.store < 0.6 * other.store
    assert affine.imbalance < 2
