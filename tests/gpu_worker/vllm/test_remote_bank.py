"""The far bank: changes arrive in order, several at a time, and a failure is reported once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import torch

from gpu_worker.bank.device_layout import DeviceAdapter, to_device_layout
from gpu_worker.vllm.remote_bank import Change, PlannedResidency, RemoteBank
from tests.gpu_worker.engine_driver import run
from tests.tiny import random_adapter

SHAPES = {"m": (4, 3)}


def adapter(seed: int) -> DeviceAdapter:
    return to_device_layout(random_adapter(SHAPES, seed, rank=2), SHAPES, torch.float32)


class Far:
    """Records what it is sent. Each call takes a turn of the event loop."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.failures: list[Exception] = []
        self.error: Exception | None = None

    async def send(self, changes: list[Change]) -> None:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.calls.append([f"{kind} {digest}" for kind, digest, *_ in changes])


def served(main: Any) -> Any:
    async def within() -> Any:
        far = Far()
        return await main(far, RemoteBank(6, far.send, far.failures.append))

    made: Coroutine[Any, Any, Any] = within()
    return run(made)


def test_changes_made_together_are_sent_together_and_in_order() -> None:
    one, two = adapter(1), adapter(2)

    async def main(far: Far, bank: RemoteBank) -> None:
        bank.write([0, 1], one)
        bank.free([0, 1])
        bank.write([0, 1], two)
        await bank.drained()
        assert far.calls == [[f"put {one.weights_digest}", f"drop {one.weights_digest}", f"put {two.weights_digest}"]]
        bank.free([0, 1])
        await bank.drained()
        assert far.calls[1:] == [[f"drop {two.weights_digest}"]]

    served(main)


def test_written_returns_when_the_workers_hold_the_adapter() -> None:
    one = adapter(1)

    async def main(far: Far, bank: RemoteBank) -> None:
        bank.write([2, 3], one)
        assert far.calls == []
        await bank.written([one.weights_digest])
        assert far.calls == [[f"put {one.weights_digest}"]]

    served(main)


def test_a_failure_is_reported_and_later_changes_are_sent_again() -> None:
    one, two = adapter(1), adapter(2)

    async def main(far: Far, bank: RemoteBank) -> None:
        far.error = RuntimeError("lost")
        bank.write([0, 1], one)
        await bank.drained()
        assert far.failures == [far.error]
        far.error = None
        bank.write([2, 3], two)
        await bank.drained()
        assert far.calls == [[f"put {two.weights_digest}"]]

    served(main)


def test_an_adapter_that_was_never_sent_is_not_dropped() -> None:
    one, two, three = adapter(1), adapter(2), adapter(3)

    async def main(far: Far, bank: RemoteBank) -> None:
        residency = PlannedResidency(bank)
        assert residency.try_pin([one.weights_digest], {one.weights_digest: one})
        residency.unpin([one.weights_digest])
        residency.evict(one.weights_digest)  # before `settle` sent it
        others = {later.weights_digest: later for later in (two, three)}
        assert residency.try_pin(list(others), others)
        residency.settle()
        assert residency.active_rows == 4
        await bank.drained()
        assert far.calls == [[f"put {digest}" for digest in others]]

    served(main)
