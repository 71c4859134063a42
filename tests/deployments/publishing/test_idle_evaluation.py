"""Evaluations that follow a publish: only while no request runs, one at a time, bounded, and visible."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.api.adapters import PublishItem
from deployments.calls.worker_client import BaseWorkers, Workers, serve_worker
from deployments.observability.request_metrics import ChangeMetrics
from deployments.publishing.evaluation import Evaluator
from deployments.publishing.idle_evaluation import MAX_REGIONS, POLL_S, QUIET_S, IdleEvaluations, IdleScorer
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.request.request import Delta, Job
from lora_store import AdapterRecord, Sample, StoreUnavailable
from retriever_svc import Region, ServedBases
from tests.deployments.adapter_records import POOL, pool_of
from tests.deployments.app_fakes import Served, http_of, serve_plainly
from tests.deployments.console_fakes import HOLDINGS, CountingWorker
from tests.deployments.fake_publishing import workers_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.metric_fakes import FakeMetrics
from tests.fakes import FakeHandle
from tests.virtual_time import in_virtual_time, run_in_virtual_time

POET, CODER = POOL
EXAMPLES = tuple(Sample(f"prompt {number}", "Yes.") for number in range(4))
REGION = Region(POET, (POET, CODER), EXAMPLES, frozenset({POET.ref, CODER.ref}))
IDLE = replace(HOLDINGS, num_running=0, num_waiting=0)
RUNNING, WAITING = replace(IDLE, num_running=1), replace(IDLE, num_waiting=1)


@dataclass
class Poet(CountingWorker):
    """Answers as the poet's adapter should; `states` are its states in turn, then it is idle."""

    states: list[EngineStatus] = field(default_factory=list)

    async def load(self) -> EngineStatus:
        return self.states.pop(0) if self.states else IDLE

    async def stream(self, job: Job):  # type: ignore[no-untyped-def,override]
        [row] = job.plan.adapters
        yield Delta("yes" if row.ref == POET.ref else "no", 3, 1)
        yield Delta("", 3, 1, "stop")


class Sleeper:
    """A sleep that ends at once, and remembers how long it was to take."""

    def __init__(self) -> None:
        self.slept_s: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        await asyncio.sleep(0)


class Ones:
    """Scores everything with 1."""

    async def scores(self, adapter: AdapterRecord, examples: Sequence[Sample]) -> Sequence[float]:
        return [1.0] * len(examples)

    async def can_score(self, adapter: AdapterRecord) -> bool:
        return True


@pytest.mark.parametrize(("workers", "num_polls"), [([[]], 0), ([[RUNNING, WAITING]], 2), ([[], [RUNNING]], 1)])
def test_a_batch_begins_when_no_worker_has_a_request(workers: list[list[EngineStatus]], num_polls: int) -> None:
    sleeper = Sleeper()
    client = serve_worker(FakeHandle(*[Poet(states=list(states)) for states in workers]))
    assert asyncio.run(IdleScorer(Ones(), workers_of(client), sleeper).scores(POET, EXAMPLES)) == [1.0] * 4
    assert sleeper.slept_s == [POLL_S] * num_polls


@pytest.mark.parametrize("num_silent", [0, 1], ids=["scaled to zero", "silent"])
def test_without_a_worker_it_waits_and_starts_none(num_silent: int) -> None:
    handle = FakeHandle(num_silent=num_silent)

    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000 * POLL_S):
                await IdleScorer(Ones(), workers_of(serve_worker(handle))).scores(POET, EXAMPLES)

    run_in_virtual_time(run())
    assert handle.called("module_shapes") == handle.called("stream") == []


def test_of_several_base_models_one_without_workers_is_left_out() -> None:
    clients = [
        serve_worker(FakeHandle(Poet())),
        serve_worker(FakeHandle()),
        serve_worker(FakeHandle(Poet(), num_silent=1)),
    ]
    by_model = {name: BaseWorkers(client, None) for name, client in zip("abc", clients, strict=True)}
    scorer = IdleScorer(Ones(), Workers(by_model, ServedBases({name: {name} for name in "abc"})))
    found = [asyncio.run(scorer.can_score(replace(POET, base_model=name))) for name in "abc"]
    assert found == [True, False, True], "a busy one is waited for"


@in_virtual_time
async def test_what_is_left_out_keeps_its_ranking() -> None:
    class AwayOnes(Ones):
        async def can_score(self, adapter: AdapterRecord) -> bool:
            return adapter.ref != POET.ref

    other = Region(CODER, (CODER, POET), EXAMPLES, frozenset({POET.ref, CODER.ref}))
    async with serving(regions=(REGION, other)) as served:
        services = served.services
        retriever, publisher = services.retriever, services.publisher
        evaluator = Evaluator(services.store, retriever, publisher, AwayOnes())
        async for _ in evaluator.evaluate("acme", "me"):
            pass
        [(_, rankings, _, _, keeps)] = served.store.called("rank")
        assert ([item.anchor for item in rankings], keeps) == ([CODER.ref], [POET.ref])


async def publish(served: Served, times: int = 1) -> None:
    for _ in range(times):
        [outcome] = await served.services.publisher.publish([PublishItem(Path("new"))], "me")
        assert not isinstance(outcome, Exception), outcome


@asynccontextmanager
async def serving(
    *, regions: Iterable[Region] = (REGION,), kinds: FakeMetrics | None = None, **settings: Any
) -> AsyncIterator[Served]:
    retriever = FakeRetriever(to_evaluate=regions)
    served = serve_plainly(worker=Poet(), retriever=retriever, kinds=kinds or FakeMetrics(), **settings)
    yield served
    await served.services.background.idle()


@in_virtual_time
async def test_several_publishes_of_two_tenants_are_followed_by_one_evaluation_each() -> None:
    async with serving() as served:
        goes_on, slept_s = asyncio.Event(), list[float]()

        async def sleep(seconds: float) -> None:
            slept_s.append(seconds)
            await goes_on.wait()

        services, metrics = served.services, ChangeMetrics(FakeMetrics())
        idle = IdleEvaluations(services.evaluator, services.background, metrics, sleep=sleep)
        for tenant in ("acme", "globex", "acme"):
            idle.after_publish(tenant, "me")
        await asyncio.sleep(0)
        assert [idle.state_of(t)["state"] for t in ("acme", "globex", "other")] == ["waiting", "waiting", "idle"]
        goes_on.set()
        await services.background.idle()
        assert [tenant for tenant, *_ in served.store.called("rank")] == ["acme", "globex"]
        assert slept_s == [QUIET_S] * 2
        assert idle.state_of("acme")["last"]["outcome"] == "ok"
        assert idle.state_of("other") == {"state": "idle", "last": None}
        idle.after_publish("acme", "me")  # it starts again
        await services.background.idle()
        assert len(served.store.called("rank")) == 3


@in_virtual_time
async def test_an_evaluation_that_fails_is_logged_and_shown() -> None:
    store = FakeStore(pool_of(*POOL), failing={"ping": (StoreUnavailable("down"), 9)})
    async with serving(store=store) as served:
        services, metrics = served.services, FakeMetrics()
        idle = IdleEvaluations(services.evaluator, services.background, ChangeMetrics(metrics), sleep=Sleeper())
        idle.after_publish("acme", "me")
        await services.background.idle()
        assert idle.state_of("acme")["last"]["outcome"] == "store_unavailable"
        assert metrics["pool_changes_total"].counts["evaluate", "store_unavailable"] == 1


@in_virtual_time
async def test_an_evaluation_after_a_publish_is_counted_and_shown() -> None:
    kinds = FakeMetrics()
    async with serving(kinds=kinds, evaluate_after_publish=True) as served:
        await publish(served, times=3)
        await served.services.background.idle()
        async with http_of(served) as client:
            last = (await client.get("/v1/stats")).json()["evaluation"]
    assert 1 <= len(served.store.called("rank")) <= 3
    tenant, rankings, actor, *_ = served.store.called("rank")[0]
    assert (tenant, [ranking.anchor for ranking in rankings], actor) == ("local", [POET.ref], "me")
    assert (last["state"], last["last"]["outcome"], last["last"]["num_regions"]) == ("idle", "ok", 1)
    assert kinds["pool_changes_total"].counts["evaluate", "ok"] == len(served.store.called("rank"))


@in_virtual_time
async def test_by_default_nothing_is_evaluated_after_a_publish() -> None:
    async with serving() as served:
        await publish(served)
        async with http_of(served) as client:
            assert (await client.get("/v1/stats")).json()["evaluation"] is None
    assert served.store.called("rank") == []


@pytest.mark.parametrize("num_regions", [0, MAX_REGIONS + 100])
@in_virtual_time
async def test_no_regions_and_too_many_store_nothing(num_regions: int) -> None:
    regions = iter([REGION] * num_regions)
    async with serving(regions=regions, evaluate_after_publish=True) as served:
        await publish(served)
    assert len(list(regions)) == max(0, num_regions - MAX_REGIONS - 1), "the others were not asked for"
    assert served.store.called("rank") == []
    assert served.worker.called("stream") == []
