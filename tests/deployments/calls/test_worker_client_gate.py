from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.exceptions import RayActorError

from deployments.api.adapters import PublishItem
from deployments.calls.worker_client import KEPT_S, RECENT_S, BaseWorkers, serve_worker
from deployments.errors import WorkerStarting
from tests.deployments.adapter_records import BASE, POOL, adapter, pool_of
from tests.deployments.app_fakes import Served
from tests.deployments.asking import asked, error_of
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import SHAPES, FakeWorker
from tests.fakes import FakeHandle
from tests.virtual_time import in_virtual_time


@dataclass
class Sleeper(FakeWorker):
    """Answers once it is awake, first with `errors`."""

    awake: asyncio.Event = field(default_factory=asyncio.Event)
    errors: list[Exception] = field(default_factory=list)

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        await self.awake.wait()
        if self.errors:
            raise self.errors.pop(0)
        return SHAPES


class Held:
    """BaseWorkers over one sleeper; `now_s` is its clock."""

    def __init__(self, *errors: Exception, timeout_s: float | None = 5.0, status: Any = None) -> None:
        self.now_s, self.worker = 0.0, Sleeper(errors=list(errors))
        self.handle = FakeHandle(self.worker)
        self.workers = BaseWorkers(serve_worker(self.handle, status=status), timeout_s, clock=lambda: self.now_s)

    @property
    def num_calls(self) -> int:
        return len(self.handle.called("module_shapes"))


async def test_the_starting_call_continues_after_its_waiters_have_left_and_answers_the_others() -> None:
    held = Held(timeout_s=0.01)
    for _ in range(3):
        with pytest.raises(WorkerStarting):
            await held.workers.ready()
    leaving = asyncio.create_task(held.workers.ready())
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert held.num_calls == 1 and held.handle.responses[0].num_cancels == 0
    held.workers._timeout_s = 120
    waiting = [asyncio.create_task(held.workers.ready()) for _ in range(5)]
    await asyncio.wait(waiting, timeout=0.01)
    assert not any(task.done() for task in waiting)
    held.worker.awake.set()
    await asyncio.gather(*waiting)
    assert held.num_calls == 1


async def test_a_worker_that_answered_is_not_asked_again_for_a_while() -> None:
    held = Held()
    held.worker.awake.set()
    for now_s, num_calls in ((0, 1), (KEPT_S * 0.9, 1), (KEPT_S * 1.1, 2), (KEPT_S * 2, 2)):
        held.now_s = now_s
        await held.workers.ready()
        await settle()
        assert held.num_calls == num_calls


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_worker_that_hangs_after_an_answer_holds_no_request_while_the_answer_is_recent() -> None:
    held = Held(timeout_s=0.01)
    held.worker.awake.set()
    await held.workers.ready()
    held.worker.awake.clear()
    held.now_s = RECENT_S * 0.9
    await held.workers.ready()
    await settle()
    assert held.num_calls == 2
    held.now_s = RECENT_S * 1.1
    with pytest.raises(WorkerStarting):
        await held.workers.ready()


@pytest.mark.parametrize(("running", "num_calls"), [(2, 2), (0, 1)])
@in_virtual_time
async def test_a_silent_call_is_sent_again_only_if_a_worker_runs(running: int, num_calls: int) -> None:
    worker = SimpleNamespace(status="HEALTHY", replica_states={"RUNNING": running})
    overview = SimpleNamespace(applications={"app": SimpleNamespace(deployments={"Worker": worker})})
    held = Held(timeout_s=15.0, status=lambda: overview)
    with pytest.raises(WorkerStarting):
        await held.workers.ready()
    assert held.num_calls == num_calls


async def test_a_worker_that_dies_while_answering_is_reported_and_another_is_started() -> None:
    held = Held(RayActorError())
    held.worker.awake.set()
    with pytest.raises(RayActorError):
        await held.workers.ready()
    await held.workers.ready()
    assert held.num_calls == 2


async def test_workers_that_never_scale_to_zero_are_not_called() -> None:
    held = Held(timeout_s=None)
    await held.workers.ready()
    assert not await held.workers.is_scaled_to_zero()
    assert held.num_calls == 0


@pytest.mark.parametrize(
    ("status", "states", "sleeps"),
    [
        ("HEALTHY", {}, True),
        ("HEALTHY", {"STOPPING": 1}, True),
        ("HEALTHY", {"RUNNING": 1}, False),
        ("UPSCALING", {"STARTING": 1}, True),
        ("UPDATING", {"STARTING": 1}, False),  # the first start: whether a worker can run is not known yet
        ("UNHEALTHY", {}, False),
        ("DEPLOY_FAILED", {}, False),
    ],
)
def test_workers_are_scaled_to_zero_if_none_runs_and_none_has_failed(
    status: str, states: dict[str, int], sleeps: bool
) -> None:
    worker = SimpleNamespace(status=status, replica_states=states)
    overview = SimpleNamespace(applications={"app": SimpleNamespace(deployments={"Worker": worker})})
    handle: Any = SimpleNamespace(app_name="app", deployment_name="Worker")
    workers = BaseWorkers(serve_worker(handle, status=lambda: overview), 1.0)  # type: ignore[arg-type, return-value]
    assert asyncio.run(workers.is_scaled_to_zero()) is sleeps


async def completion(worker: Sleeper, model: str, **settings: Any) -> tuple[httpx.Response, Served]:
    async with asked(worker=worker, **settings) as (client, served):
        return await client.post("/v1/completions", json={"model": model, "prompt": "x"}), served


ASLEEP = {"worker_scaling": {"autoscaling_config": {"min_replicas": 0}}, "scale_from_zero_timeout_s": 0.01}


async def test_a_request_without_a_worker_in_time_is_refused_with_retry_after() -> None:
    response, served = await completion(Sleeper(), BASE, **ASLEEP)
    assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
    assert response.headers["retry-after"] == "1"
    assert served.worker.called("stream") == []


async def test_a_request_that_cannot_be_answered_starts_no_worker() -> None:
    response, served = await completion(Sleeper(), "nobody", **ASLEEP)
    assert response.status_code == 404
    assert served.worker.calls == []


async def test_a_request_is_answered_by_the_worker_that_it_started() -> None:
    worker = Sleeper()
    worker.awake.set()
    response, served = await completion(worker, BASE, **ASLEEP | {"scale_from_zero_timeout_s": 120})
    assert response.status_code == 200
    assert [call.name for call in served.worker.calls] == ["module_shapes", "stream"]


async def test_a_publish_without_a_worker_in_time_leaves_nothing() -> None:
    store = FakeStore(pool_of(*POOL, adapter("poet", version="older")))
    async with asked(worker=Sleeper(), store=store, **ASLEEP) as (_, served):
        publisher = served.services.publisher
        with pytest.raises(WorkerStarting):
            await publisher.publish([PublishItem(Path("new"))], "tester")
        with pytest.raises(WorkerStarting):
            await publisher.rollback(("local", "poet"), None, "tester")
    assert [call.name for call in served.store.calls] == ["active_encoder", "active_encoder", "versions"]
