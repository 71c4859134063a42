from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.background import Background
from deployments.calls.catalogue_clients import serve_store
from deployments.calls.worker_client import serve_worker
from deployments.publishing.reclaimer import Reclaimer, withdraw_expired
from lora_store import AdapterRecord, StoreUnavailable
from tests.deployments.adapter_records import POOL, adapter, pool_of
from tests.deployments.fake_publishing import workers_of
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import FakeWorker
from tests.fakes import FakeHandle

OLD = adapter("old")


class Reclaiming:
    """A Reclaimer over fakes; `pauses` are the waits between its calls."""

    def __init__(
        self, *workers: FakeWorker, store: FakeStore | None = None, num_stores: int = 1, **worker: Any
    ) -> None:
        self.fake_store = store or FakeStore(pool_of(*POOL))
        self.store = FakeHandle(*[self.fake_store] * num_stores)
        self.worker = FakeHandle(*workers, **worker)
        self.pauses: list[float] = []

    def __call__(self, *records: AdapterRecord, longest_request_s: float = 600) -> None:
        async def run() -> None:
            background = Background()
            clients = serve_store(self.store), workers_of(serve_worker(self.worker))
            reclaimer = Reclaimer(*clients, background, longest_request_s=longest_request_s, sleep=self._pause)
            reclaimer.reclaim(records)
            await background.idle()

        asyncio.run(run())

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    @property
    def steps(self) -> list[str]:
        return [call.name for call in sorted(self.store.calls + self.worker.calls, key=lambda call: call.number)]


@pytest.mark.parametrize("workers", [[], [FakeWorker()], [FakeWorker(forgets=[RayActorError()]), FakeWorker()]])
def test_unreferenced_blobs_are_forgotten_then_swept_then_released(workers: list[FakeWorker]) -> None:
    """A worker that died, or that is scaled to zero, holds nothing; blobs of another adapter stay."""
    reclaiming = Reclaiming(*workers, num_stores=3)
    reclaiming(OLD, POOL[0])
    assert reclaiming.steps == ["unreferenced", "forget", "sweep", "release", "forget"]
    assert reclaiming.worker.called("forget") == [([OLD.weights_digest],)] * 2
    assert reclaiming.fake_store.swept == sorted(OLD.blobs)
    assert reclaiming.store.called("release") == [(sorted(OLD.blobs),)]
    assert reclaiming.store.timeouts_s != [], "every replica of the store drops its references"
    assert reclaiming.pauses == []
    nothing = Reclaiming(*workers)
    nothing(POOL[0])
    nothing()
    assert nothing.steps == ["unreferenced"]


def test_calls_of_a_silent_worker_are_repeated() -> None:
    reclaiming = Reclaiming(FakeWorker(), num_silent=1)
    reclaiming(OLD, longest_request_s=1)
    assert reclaiming.steps == ["unreferenced", "forget", "forget", "sweep", "release", "forget"]
    assert None not in reclaiming.worker.timeouts_s


@pytest.mark.parametrize("method", ["unreferenced", "sweep"])
def test_calls_of_an_unavailable_store_are_repeated_until_the_blobs_are_gone(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    reclaiming = Reclaiming(store=FakeStore(failing={method: (StoreUnavailable("down"), 1)}))
    reclaiming(OLD)
    assert reclaiming.fake_store.swept == sorted(OLD.blobs)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(reclaiming.pauses) == 1


def test_a_store_that_stays_down_leaves_the_blobs_to_gc(caplog: pytest.LogCaptureFixture) -> None:
    reclaiming = Reclaiming(store=FakeStore(failing={"unreferenced": (StoreUnavailable("down"), 1000)}))
    reclaiming(OLD, longest_request_s=5)
    assert reclaiming.fake_store.swept == []
    assert caplog.records[-1].levelname == "ERROR"


def test_nothing_is_swept_before_every_worker_has_dropped_it() -> None:
    reclaiming = Reclaiming(FakeWorker(forgets=[False, True]), FakeWorker(forgets=[True, False, True]))
    reclaiming(OLD)
    assert reclaiming.steps == ["unreferenced", "forget", "forget", "forget", "sweep", "release", "forget"]
    assert len(reclaiming.pauses) == 2


@pytest.mark.parametrize("answer", [False, RuntimeError("broken"), DeploymentUnavailableError(DeploymentID("W", "a"))])
def test_the_wait_for_a_worker_is_limited_by_the_longest_request(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    reclaiming = Reclaiming(FakeWorker(forgets=[answer] * 1000))
    reclaiming(OLD, longest_request_s=20)
    assert sum(reclaiming.pauses) == 20
    assert reclaiming.fake_store.swept == sorted(OLD.blobs)
    assert any("still holds" in record.getMessage() for record in caplog.records)


def test_calls_of_a_missing_store_are_repeated() -> None:
    reclaiming = Reclaiming(FakeWorker(), num_stores=2)
    reclaiming.store.broadcast = FakeHandle().broadcast  # type: ignore[method-assign]
    reclaiming(OLD, longest_request_s=1)
    assert len(reclaiming.pauses) == 2


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (StoreUnavailable("away"), "WARNING"),
        (RayActorError(), "WARNING"),
        (KeyError("a defect"), "ERROR"),
        (TimeoutError(), "ERROR"),
    ],
)
def test_expired_adapters_are_withdrawn_again_after_any_error(
    error: Exception, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    outcomes: list[Exception | None] = [None, error, None]

    async def expire() -> None:
        if (outcome := outcomes.pop()) is not None:
            raise outcome

    async def sleep(delay_s: float) -> None:
        if not outcomes:
            raise asyncio.CancelledError
        waits.append(delay_s)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(withdraw_expired(expire, sleep))
    assert (outcomes, len(waits)) == ([], 3)
    assert [record.levelname for record in caplog.records] == [level]
