"""The far bank: changes arrive in order, several at a time, and a failure is reported once."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Mapping

import pytest
import torch

from gpu_worker.bank.device_layout import DeviceAdapter, to_device_layout
from gpu_worker.errors import AdapterUnfit, PlanTooLarge
from gpu_worker.vllm.fusions import composed, with_fusion
from gpu_worker.vllm.packing import Change
from gpu_worker.vllm.remote_bank import PlannedResidency, RemoteBank
from lora_store.adapter import AdapterRef, Shapes
from lora_store.plan import Plan, PlannedAdapter
from tests.tiny import random_adapter

SHAPES = {"m": (4, 3)}


def adapter(seed: int) -> DeviceAdapter:
    return to_device_layout(random_adapter(SHAPES, seed, rank=2), SHAPES, torch.float32)


def fusion(*parts: DeviceAdapter, weight: float = 0.5, shapes: Shapes = SHAPES) -> DeviceAdapter:
    members = tuple(PlannedAdapter(AdapterRef("-", "-", "-"), part.weights_digest, weight) for part in parts)
    [planned] = with_fusion(Plan("fusion", members)).adapters
    average = composed(planned.weights_digest, [(part, weight) for part in parts])
    return to_device_layout(average, shapes, torch.float32)


def pin(residency: PlannedResidency, *adapters: DeviceAdapter) -> bool:
    loaded = {each.weights_digest: each for each in adapters}
    return residency.try_pin(list(loaded), loaded)


class Far:
    """Records what it is sent. Each call takes a turn of the event loop."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.failures: list[Exception] = []
        self.error: Exception | None = None
        self.unfit: dict[str, str] = {}
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def send(self, changes: list[Change]) -> Mapping[str, str]:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.calls.append([f"{kind} {digest}" for kind, digest, *_ in changes])
        await self.may_answer.wait()
        return self.unfit


def served() -> tuple[Far, RemoteBank]:
    far = Far()
    return far, RemoteBank(far.send, far.failures.append)


async def test_changes_made_together_are_sent_together_and_in_order() -> None:
    one, two = adapter(1), adapter(2)
    far, bank = served()
    bank.put(one)
    bank.drop(one.weights_digest)
    bank.put(two)
    await bank.drained()
    assert far.calls == [[f"put {one.weights_digest}", f"drop {one.weights_digest}", f"put {two.weights_digest}"]]
    bank.drop(two.weights_digest)
    await bank.drained()
    assert far.calls[1:] == [[f"drop {two.weights_digest}"]]


async def test_adapters_are_sent_a_bounded_number_of_bytes_at_a_time() -> None:
    adapters = [adapter(seed) for seed in range(5)]
    far = Far()
    bank = RemoteBank(far.send, far.failures.append, most_bytes=2 * adapters[0].num_bytes)
    for each in adapters:
        bank.put(each)
    bank.drop(adapters[0].weights_digest)
    await bank.drained()
    puts = [f"put {each.weights_digest}" for each in adapters]
    assert far.calls == [puts[:2], puts[2:4], [puts[4], f"drop {adapters[0].weights_digest}"]]
    smallest = RemoteBank(far.send, far.failures.append, most_bytes=1)
    smallest.put(adapters[0])
    await smallest.drained()
    assert far.calls[3:] == [puts[:1]], "a larger adapter is sent alone"


async def test_written_returns_when_the_workers_hold_the_adapter() -> None:
    one = adapter(1)
    far, bank = served()
    bank.put(one)
    assert far.calls == []
    await bank.written([one.weights_digest])
    assert far.calls == [[f"put {one.weights_digest}"]]


async def test_an_adapter_that_the_workers_hold_is_not_kept_here() -> None:
    _, bank = served()
    one = adapter(1)
    digest, tensor = one.weights_digest, weakref.ref(one.modules["m"].a)
    bank.put(one)
    del one
    await bank.drained()
    gc.collect()
    assert tensor() is None
    await bank.written([digest])
    bank.drop(digest)
    await bank.drained()


async def test_a_failure_is_reported_and_later_changes_are_sent_again() -> None:
    one, two = adapter(1), adapter(2)
    far, bank = served()
    far.error = RuntimeError("lost")
    bank.put(one)
    await bank.drained()
    assert far.failures == [far.error]
    far.error = None
    bank.put(two)
    await bank.drained()
    assert far.calls == [[f"put {two.weights_digest}"]]


async def test_waiting_for_changes_ends_while_others_come_and_go() -> None:
    one = adapter(1)
    far, bank = served()

    async def change_for_ever() -> None:
        while True:
            bank.put(one)
            bank.drop(one.weights_digest)
            await asyncio.sleep(0)

    changing = asyncio.ensure_future(change_for_ever())
    while not far.calls:
        await asyncio.sleep(0)
    num_before = len(far.calls)
    await bank.drained()
    assert len(far.calls) <= num_before + 2
    changing.cancel()
    await bank.drained()


async def test_waiting_for_changes_ends_when_they_fail() -> None:
    far, bank = served()
    far.may_answer.clear()
    bank.put(adapter(1))
    while not far.calls:
        await asyncio.sleep(0)
    waiting = [asyncio.ensure_future(bank.drained())]
    await asyncio.sleep(0)
    bank.put(adapter(2))
    waiting.append(asyncio.ensure_future(bank.drained()))
    far.error = RuntimeError("lost")
    far.may_answer.set()
    await asyncio.gather(*waiting)
    assert far.failures == [far.error]


async def test_only_rows_of_an_adapter_that_the_workers_refuse_get_the_reason() -> None:
    one, two = adapter(1), adapter(2)
    far, bank = served()
    far.unfit = {one.weights_digest: "the base model has no module 'm' in vLLM"}
    bank.put(one)
    bank.put(two)
    for _ in range(2):  # a later request for it neither asks the workers again nor ends them
        with pytest.raises(AdapterUnfit, match="no module 'm' in vLLM"):
            await bank.written([two.weights_digest, one.weights_digest])
    await bank.written([two.weights_digest])
    bank.drop(one.weights_digest)
    await bank.drained()
    assert len(far.calls) == 2 and far.failures == []


async def test_an_adapter_that_is_sent_again_is_written_when_the_second_sending_is() -> None:
    one = adapter(1)
    far, bank = served()
    far.may_answer.clear()
    bank.put(one)
    while not far.calls:
        await asyncio.sleep(0)
    bank.drop(one.weights_digest)
    bank.put(one)
    waiting = asyncio.ensure_future(bank.written([one.weights_digest]))
    far.may_answer.set()
    far.may_answer = asyncio.Event()  # of the second sending
    while len(far.calls) < 2:
        assert not waiting.done(), "the first sending does not count"
        await asyncio.sleep(0)
    assert not waiting.done()
    far.may_answer.set()
    await waiting
    await bank.drained()


async def test_an_adapter_that_was_never_sent_is_not_dropped() -> None:
    one, two, three = adapter(1), adapter(2), adapter(3)
    far, bank = served()
    residency = PlannedResidency(bank, 4, 4)
    assert pin(residency, one)
    residency.unpin([one.weights_digest])
    residency.drop([one.weights_digest])  # before `settle` sent it
    assert pin(residency, two, three)
    residency.settle()
    assert residency.active_rows == 4
    await bank.drained()
    assert far.calls == [[f"put {later.weights_digest}" for later in (two, three)]]


async def test_fusions_and_adapters_have_rows_of_their_own() -> None:
    one, two, three = adapter(1), adapter(2), adapter(3)
    average = fusion(one, two, three)
    far, bank = served()
    residency = PlannedResidency(bank, 4, 2)
    assert pin(residency, one, two), "the adapters' rows are full"
    assert pin(residency, average)
    assert not pin(residency, three)
    residency.settle()
    assert (residency.occupied_rows, residency.active_rows) == (6, 6)
    assert residency.resident == {each.weights_digest for each in (one, two, three)}, "three is part of the fusion"
    assert average.weights_digest in residency and three.weights_digest not in residency
    await bank.drained()
    assert far.calls == [[f"put {each.weights_digest}" for each in (one, two, average)]]


async def test_experts_of_fusions_and_of_adapters_have_room_of_their_own() -> None:
    shapes = {"m": (4, 3), "experts.down_proj": (4, 3, 2)}
    one, two = (to_device_layout(random_adapter(shapes, seed, rank=2), shapes, torch.float32) for seed in (1, 2))
    average = fusion(one, two, shapes=shapes)
    assert one.expert_bytes == average.expert_bytes == 4 * 2 * 2 * (4 + 3)
    _, bank = served()
    residency = PlannedResidency(bank, 8, 8, (one.expert_bytes, average.expert_bytes))
    assert pin(residency, one)
    assert not pin(residency, two), "the first one is in use"
    assert pin(residency, average)
    with pytest.raises(PlanTooLarge, match="bytes for their experts"):
        pin(PlannedResidency(bank, 8, 8), one)


async def test_a_fusion_of_higher_rank_than_the_rows_for_fusions_is_refused() -> None:
    average = fusion(adapter(1), adapter(2))
    _, bank = served()
    with pytest.raises(
        PlanTooLarge,
        match=r"needs 2 rank rows, the bank has 1 for fusions \(worker.fusion_rank_rows\); use adapters",
    ):
        pin(PlannedResidency(bank, 4, 1), average)


async def test_the_least_recently_used_fusion_leaves_first_and_one_in_use_never() -> None:
    parts = [adapter(seed) for seed in range(2)]
    first, second, third = (fusion(*parts, weight=weight) for weight in (0.1, 0.2, 0.3))
    _, bank = served()
    residency = PlannedResidency(bank, 4, 4)
    assert pin(residency, first) and pin(residency, second)
    residency.settle()
    assert not pin(residency, third), "both are in use"
    residency.unpin([second.weights_digest])
    residency.unpin([first.weights_digest])
    assert pin(residency, first), "which makes the second the oldest"
    assert pin(residency, third)
    assert second.weights_digest not in residency and not pin(residency, second)


async def test_a_withdrawn_adapter_takes_its_fusions_along() -> None:
    one, two, three = adapter(1), adapter(2), adapter(3)
    averages = [fusion(one, two), fusion(two, three)]
    far, bank = served()
    residency = PlannedResidency(bank, 6, 4)
    for each in (one, three, *averages):
        assert pin(residency, each)
        residency.settle()
        residency.unpin([each.weights_digest])
    residency.drop([one.weights_digest])
    await bank.drained()
    gone = [command for call in far.calls for command in call if command.startswith("drop")]
    assert gone == [f"drop {one.weights_digest}", f"drop {averages[0].weights_digest}"]
    assert residency.resident == {two.weights_digest, three.weights_digest}
    assert residency.occupied_rows == 4
