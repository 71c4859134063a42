"""The bank's bookkeeping, over a row store that is a list."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule
from gpu_worker.bank.residency import Residency
from gpu_worker.errors import PlanTooLarge
from lora_store.adapter import AdapterWeights, ModuleWeights

NUM_ROWS = 10
RANKS = [1, 1, 2, 3, 3, 4, 5, 7, 10, 11]  # the last one never fits


def adapter(digest: str, rank: int, *other_ranks: int) -> DeviceAdapter:
    """Return an adapter whose widest module has the largest of the ranks."""
    modules = {str(i): DeviceModule(torch.zeros(r, 1), torch.zeros(r, 1)) for i, r in enumerate((rank, *other_ranks))}
    return DeviceAdapter(digest, modules)


def try_pin(residency: Residency, *adapters: DeviceAdapter) -> bool:
    """Pin with all weights loaded, and settle."""
    by_digest = {adapter.weights_digest: adapter for adapter in adapters}
    is_pinned = residency.try_pin(list(by_digest), by_digest)
    residency.settle()
    return is_pinned


def unpin(residency: Residency, *digests: str) -> None:
    residency.unpin(digests)
    residency.settle()


POOL = [adapter(f"d{i}", 1, rank, 1) for i, rank in enumerate(RANKS)]  # the widest module decides


STALE = ("nobody's", 0)


class RowList:
    """Rows as (digest, rank index); None for free rows, `STALE` for the source of a move."""

    def __init__(self, num_rows: int = NUM_ROWS) -> None:
        self.num_rows = num_rows
        self.content: list[tuple[str, int] | None] = [None] * num_rows
        self.active = 0
        self.num_swapped = 0

    def write(self, rows: Sequence[int], adapter: DeviceAdapter) -> None:
        for index, row in enumerate(rows):
            self.content[row] = (adapter.weights_digest, index)

    def swap(self, rows: Sequence[int], others: Sequence[int]) -> None:
        assert len(set(rows) | set(others)) == 2 * len(rows) == 2 * len(others)
        self.num_swapped += len(rows)
        for row, other in zip(rows, others, strict=True):
            self.content[row], self.content[other] = self.content[other], self.content[row]

    def move(self, rows: Sequence[int], to: Sequence[int]) -> None:
        assert len(set(rows) | set(to)) == 2 * len(rows) == 2 * len(to)
        self.num_swapped += len(rows)
        for row, other in zip(rows, to, strict=True):
            self.content[row], self.content[other] = STALE, self.content[row]

    def free(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.content[row] = None

    def set_active(self, num_rows: int) -> None:
        self.active = num_rows


class ResidencyMachine(RuleBasedStateMachine):
    """Random plans are pinned and unpinned; a simple list of pins and of last uses gives the expected state."""

    IS_PACKED = True

    def __init__(self) -> None:
        super().__init__()
        self.bank = RowList()
        self.residency = Residency(self.bank, is_packed=self.IS_PACKED)
        self.plans: list[list[DeviceAdapter]] = []
        self.last_used: list[str] = []  # resident digests, least recently used first
        self.unwritten: set[str] = set()  # brought in since the last `settle`

    @rule(plan=st.lists(st.sampled_from(POOL), min_size=1, max_size=4, unique_by=lambda a: a.weights_digest))
    def pin(self, plan: list[DeviceAdapter]) -> None:
        """Pin with only the non-resident weights loaded."""
        before = (self.bank.content[:], self.residency.active_rows, self.residency.num_pins)
        digests = [a.weights_digest for a in plan]
        loaded = {a.weights_digest: a for a in plan if a.weights_digest not in self.residency}
        ranks = {a.weights_digest: a.max_rank for a in (*self.pinned(), *plan)}
        if sum(a.max_rank for a in plan) > NUM_ROWS:
            with pytest.raises(PlanTooLarge, match=f"has {NUM_ROWS}"):
                self.residency.try_pin(digests, loaded)
            fits = False
        else:
            fits = self.residency.try_pin(digests, loaded)
            assert fits == (sum(ranks.values()) <= NUM_ROWS), "pins when, and only when, pinned rows leave room"
        if not fits:
            assert before == (self.bank.content[:], self.residency.active_rows, self.residency.num_pins)
            return
        self.unwritten |= set(digests) - set(self.last_used)
        self.expect_evictions(plan)
        self.unwritten &= set(self.last_used)
        self.plans.append(plan)

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        plan = self.plans.pop(data.draw(st.integers(0, len(self.plans) - 1)))
        self.residency.unpin([a.weights_digest for a in plan])
        still = {a.weights_digest for a in self.pinned()}
        for a in plan:
            if a.weights_digest not in still:
                self.last_used.remove(a.weights_digest)
                self.last_used.append(a.weights_digest)

    @precondition(lambda self: self.residency.resident)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.residency.resident)))
        if digest in {a.weights_digest for a in self.pinned()}:
            with pytest.raises(AssertionError):
                self.residency.evict(digest)
        else:
            self.residency.evict(digest)
            self.last_used.remove(digest)
            self.unwritten.discard(digest)

    @rule()
    def settle(self) -> None:
        """Check that the prefix has exactly the pinned rows, and that only their outside rows have moved."""
        pinned = {a.weights_digest: a.max_rank for a in self.pinned()}
        num_active = sum(pinned.values())
        outside = [row for digest in pinned for row in self.residency.rows(digest) if row >= num_active]
        num_swapped = self.bank.num_swapped
        self.residency.settle()
        self.unwritten.clear()
        assert self.bank.num_swapped == num_swapped + len(outside)
        assert self.bank.active == self.residency.active_rows == num_active
        prefix = self.bank.content[: self.bank.active]
        assert {held[0] for held in prefix if held is not None} == set(pinned)
        assert self.residency.rank_indices() == [held[1] for held in prefix if held is not None]

    def pinned(self) -> list[DeviceAdapter]:
        return [a for plan in self.plans for a in plan]

    def expect_evictions(self, plan: list[DeviceAdapter]) -> None:
        """Check that the least recently used were evicted, and no more than needed."""
        rank_of = {a.weights_digest: a.max_rank for a in POOL}
        wanted = [a.weights_digest for a in plan]
        pinned = {a.weights_digest for a in self.pinned()}
        missing = sum(rank_of[digest] for digest in wanted if digest not in self.last_used)
        free = NUM_ROWS - sum(rank_of[digest] for digest in self.last_used)
        for digest in [d for d in self.last_used if d not in pinned and d not in wanted]:
            if free >= missing:
                break
            self.last_used.remove(digest)
            free += rank_of[digest]
        for digest in wanted:
            if digest not in pinned:
                if digest in self.last_used:
                    self.last_used.remove(digest)
                self.last_used.append(digest)

    @invariant()
    def resident_are_the_expected(self) -> None:
        assert self.residency.resident == set(self.last_used)

    @invariant()
    def rows_hold_their_own_content_in_rank_order(self) -> None:
        rank_of = {a.weights_digest: a.max_rank for a in POOL}
        for digest in self.residency.resident - self.unwritten:
            held = [self.bank.content[row] for row in self.residency.rows(digest)]
            assert held == [(digest, index) for index in range(rank_of[digest])]

    @invariant()
    def nothing_leaks(self) -> None:
        """Check that every row belongs to a resident adapter or is cleared, and every pin to a plan."""
        written = self.residency.resident - self.unwritten
        to_write = {row for digest in self.unwritten for row in self.residency.rows(digest)}  # may have old content
        held = sum(content not in (None, STALE) for row, content in enumerate(self.bank.content) if row not in to_write)
        assert held == sum(len(self.residency.rows(digest)) for digest in written)
        occupied = {row for digest in self.residency.resident for row in self.residency.rows(digest)}
        assert self.residency.occupied_rows == len(occupied)
        assert {row for row, content in enumerate(self.bank.content) if content is not None} <= occupied
        assert self.residency.num_pins == len(self.pinned())


class UnpackedMachine(ResidencyMachine):
    """A `ResidencyMachine` whose `settle` moves no rows."""

    IS_PACKED = False

    @rule()
    def settle(self) -> None:
        """Check that no row moves, and that all pinned rows may be read."""
        num_swapped = self.bank.num_swapped
        self.residency.settle()
        self.unwritten.clear()
        pinned = [row for a in self.pinned() for row in self.residency.rows(a.weights_digest)]
        assert self.bank.num_swapped == num_swapped
        assert self.residency.active_rows == len(set(pinned))
        assert self.bank.active == max(pinned, default=-1) + 1

    @rule()
    def pack(self) -> None:
        """Check the prefix, as packing by `settle` leaves it. Another `pack` moves nothing."""
        self.settle()
        num_swapped, num_misplaced = self.bank.num_swapped, self.residency.num_misplaced
        self.residency.pack()
        assert self.bank.num_swapped == num_swapped + num_misplaced
        self.residency.pack()
        super().settle()
        assert self.bank.num_swapped == num_swapped + num_misplaced


TestResidency = ResidencyMachine.TestCase
TestUnpacked = UnpackedMachine.TestCase
TestResidency.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestUnpacked.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_rows_of_the_real_bank_move_with_their_adapter_and_are_cleared_on_eviction() -> None:
    bank = LoraBank({"m": torch.nn.Linear(3, 2)}, 5, free_fill=float("nan"))
    residency = Residency(bank)
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    weights = [AdapterWeights(str(i), {"m": ModuleWeights(random(2, 3), random(2, 2), 0.5)}) for i in range(3)]
    pool = [bank.to_device_layout(each) for each in weights]
    assert try_pin(residency, pool[0]) and try_pin(residency, pool[1])
    unpin(residency, "0")  # moves behind the active prefix
    module = bank.modules["m"]
    torch.testing.assert_close(module.a, weights[1].modules["m"].lora_a)
    torch.testing.assert_close(module.bt, weights[1].modules["m"].lora_b.T * 0.5)
    assert residency.try_pin(["0"], {}), "it comes back without being written again"
    residency.settle()
    torch.testing.assert_close(module.a[residency.rows("0")], weights[0].modules["m"].lora_a)
    unpin(residency, "0", "1")
    assert try_pin(residency, pool[2])
    bank.set_active(bank.num_rows)
    held = [row for digest in residency.resident for row in residency.rows(digest)]
    free = sorted(set(range(bank.num_rows)).difference(held))
    assert residency.resident == {"1", "2"}
    assert len(free) == 1 and bool(module.a[free].isnan().all()) and bool(module.bt[free].isnan().all())


def test_an_evicted_adapter_is_unchanged_when_used_again() -> None:
    bank = LoraBank({"m": torch.nn.Linear(3, 2)}, 4, free_fill=float("nan"))
    residency = Residency(bank)
    weights = [AdapterWeights(str(i), {"m": ModuleWeights(torch.rand(2, 3), torch.rand(2, 2), 1.0)}) for i in range(2)]
    pool = [bank.to_device_layout(each) for each in weights]
    assert try_pin(residency, pool[0])
    unpin(residency, "0")
    assert try_pin(residency, pool[1])
    assert residency.rows("1") == [0, 1] and residency.rows("0") == [2, 3], "the new one is written in the prefix"
    unpin(residency, "1")
    assert residency.try_pin(["0"], {})
    residency.settle()
    module = bank.modules["m"]
    assert module.is_used
    torch.testing.assert_close(module.a, weights[0].modules["m"].lora_a)
    torch.testing.assert_close(module.bt, weights[0].modules["m"].lora_b.T)


def with_experts(digest: str, num_bytes: int) -> DeviceAdapter:
    """Return an adapter of one row whose experts take this many bytes."""
    half = torch.zeros(1, 1, num_bytes // 2, dtype=torch.uint8)
    return DeviceAdapter(
        digest, {"0": DeviceModule(torch.zeros(1, 1), torch.zeros(1, 1))}, (), {"e": DeviceModule(half, half)}
    )


def test_experts_stay_within_their_bytes_and_leave_with_their_adapters() -> None:
    residency = Residency(RowList(), expert_bytes=10)
    small, other, large = with_experts("small", 4), with_experts("other", 6), with_experts("large", 8)
    assert try_pin(residency, small) and try_pin(residency, other)
    assert residency.experts == {"small": small.experts, "other": other.experts}
    unpin(residency, "other")
    assert not try_pin(residency, large), "the pinned one and this one have 12 bytes"
    assert residency.experts.keys() == {"small", "other"}, "nothing is evicted for nothing"
    assert try_pin(residency, adapter("without", 3)) and residency.experts.keys() == {"small", "other"}
    unpin(residency, "small")
    assert try_pin(residency, large) and residency.experts.keys() == {"large"}
    with pytest.raises(PlanTooLarge, match=r"need 14 bytes for their experts, of 10 \(worker\.host_cache_bytes\)"):
        try_pin(residency, large, other)
