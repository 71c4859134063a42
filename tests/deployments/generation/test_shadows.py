"""Versions under trial over HTTP: who gets them, and that no client sees a shadow's answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.api.responses import Planned
from deployments.background import Background
from deployments.calls.worker_client import serve_worker
from deployments.generation.shadows import MAX_SHADOWS, Shadows
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.worker_metrics import TenantUsage, shadow_tenant
from gpu_worker.errors import EngineFull
from gpu_worker.front.request.request import Delta, Job
from lora_store import AdapterRecord, AdapterRef, Plan, PlannedAdapter, Snapshot, Strategy, Trial, is_valid_name
from lora_store.plan import BASE_PLAN
from retriever_svc import PinnedAdapter, Route, RouteRequest
from retriever_svc.planning import named_plan, replayed_plan, with_trials
from tests.deployments.adapter_records import adapter
from tests.deployments.app_fakes import Served
from tests.deployments.asking import asked
from tests.deployments.fake_publishing import workers_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_worker import FakeWorker
from tests.deployments.key_files import bearer, entry, write
from tests.deployments.metric_fakes import FakeMetrics
from tests.fakes import FakeHandle
from tests.soak import Scale

LIVE, OTHER = adapter("poet"), adapter("poet", version="new")
CHAT = {"messages": [{"role": "user", "content": "Rhyme"}]}
TOKENS = {"model": "poet", "tokens": [72]}


@dataclass
class TrialRetriever(FakeRetriever):
    """Knows one adapter, with this trial of its other version."""

    trial: Trial = field(default_factory=lambda: Trial(OTHER.ref.digest, 0.3))

    @property
    def pool(self) -> Snapshot:
        live: AdapterRecord = replace(LIVE, trial=self.trial)
        return Snapshot(7, {("local", "poet"): live}, previous={("local", "poet"): (OTHER,)})

    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        plan = Plan("selection", (PlannedAdapter(LIVE.ref, LIVE.weights_digest, 1.0, 0.9),), 7)
        return [Route(with_trials(plan, self.pool, "local", {LIVE.ref}), (), 7, abstained=False)] * len(requests)

    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan:
        return named_plan(self.pool, tenant, choices, strategy)

    async def replay(
        self,
        tenant: str,
        strategy: Strategy,
        pinned: Sequence[PinnedAdapter],
        generation: int,
        min_generation: int = 0,
    ) -> Plan:
        return replayed_plan(self.pool, tenant, strategy, pinned, generation)


@dataclass
class NamingWorker(FakeWorker):
    """Answers with the weights that it was asked to use. Shadows fail with `failure`, or wait for `goes_on`."""

    failure: Exception | None = None
    goes_on: asyncio.Event | None = None
    jobs: list[Job] = field(default_factory=list)

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        self.jobs.append(job)
        if job.request_id.endswith("-shadow"):
            if self.goes_on is not None:
                await self.goes_on.wait()
            if self.failure is not None:
                raise self.failure
        [row] = job.plan.adapters
        yield Delta(row.weights_digest, 5, 3, "stop")


async def shadows_end(served: Served) -> None:
    await served.services.background.idle()


async def answers_of(numbers: Sequence[int], body: dict[str, Any], **options: Any) -> list[str]:
    """Return the digest of the version that the answer to each request names. Check that it gave the text."""
    weights = {record.ref.digest: record.weights_digest for record in (LIVE, OTHER)}
    async with asked(**options) as (client, served):
        digests = []
        for number in numbers:
            headers = {"x-request-id": f"r{number}"}
            answer = (await client.post("/v1/chat/completions", json=CHAT | body, headers=headers)).json()
            [row] = answer["lora"]["adapters"]
            assert answer["choices"][0]["message"]["content"] == weights[row["digest"]]
            digests.append(row["digest"])
        await shadows_end(served)
        return digests


def chosen(trial: Trial, numbers: Sequence[int]) -> list[str]:
    return [OTHER.ref.digest if trial.includes(f"r{number}/0") else LIVE.ref.digest for number in numbers]


@pytest.mark.parametrize("model", ["auto", "poet"])
async def test_the_share_of_a_trial_answers_by_the_ids_of_the_requests_and_is_counted(model: str, scale: Scale) -> None:
    numbers = range(scale.pick("requests", small=20, full=5000))
    retriever = TrialRetriever(trial=Trial(OTHER.ref.digest, scale.pick("percent on trial", small=30, full=10) / 100))
    worker, kinds = NamingWorker(), FakeMetrics()
    digests = await answers_of(numbers, {"model": model}, retriever=retriever, worker=worker, kinds=kinds)
    assert digests == chosen(retriever.trial, numbers)
    roles = {LIVE.ref.digest: "live", OTHER.ref.digest: "trial"}
    expected = Counter((digest[:12], roles[digest], "200") for digest in digests)
    assert kinds["trial_requests_total"].counts == expected
    assert set(digests) == {LIVE.ref.digest, OTHER.ref.digest}
    share = digests.count(OTHER.ref.digest) / len(digests)
    scale.record("percent of the answers by the version on trial", 100 * share)
    assert not scale.is_full or abs(share - 0.1) <= 0.01


@pytest.mark.parametrize("pinned", [LIVE, OTHER])
async def test_a_pinned_version_is_never_replaced(pinned: AdapterRecord, scale: Scale) -> None:
    options = {"retriever": TrialRetriever(trial=Trial(OTHER.ref.digest, 1.0))}
    by_name = {"model": f"poet@{pinned.ref.digest}"}
    row = {"name": "poet", "digest": pinned.ref.digest, "weight": 1.0}
    replayed = {"lora": {"plan": {"strategy": "selection", "adapters": [row], "generation": 7}}}
    numbers = range(scale.pick("pinned requests", small=3, full=1250))
    for body in (by_name, replayed):
        digests = await answers_of(numbers, body, worker=NamingWorker(), **options)
        scale.record("pinned requests moved", sum(digest != pinned.ref.digest for digest in digests))
        assert digests == [pinned.ref.digest] * len(numbers)


@pytest.mark.parametrize("failure", [None, EngineFull("full"), RuntimeError("broken")])
async def test_the_answer_of_a_shadow_never_reaches_a_client(failure: Exception | None) -> None:
    trial = Trial(OTHER.ref.digest, 0.5, is_shadow=True)
    worker, kinds = NamingWorker(failure=failure), FakeMetrics()
    digests = await answers_of(range(20), {}, retriever=TrialRetriever(trial=trial), worker=worker, kinds=kinds)
    assert digests == [LIVE.ref.digest] * 20
    shadowed = {f"r{number}-shadow" for number in range(20) if trial.includes(f"r{number}/0")}
    shadows = [job for job in worker.jobs if job.request_id.endswith("-shadow")]
    assert {job.request_id for job in shadows} == shadowed and 0 < len(shadowed) < 20
    assert {job.plan.adapters[0].ref for job in shadows} == {OTHER.ref}
    assert {job.tenant for job in worker.jobs} == {"local", "shadow:local"}
    status = {type(None): "200", EngineFull: "503", RuntimeError: "500"}[type(failure)]
    live, other = LIVE.ref.digest[:12], OTHER.ref.digest[:12]
    counts = {(live, "live", "200"): 20, (other, "shadow", status): len(shadowed)}
    assert kinds["trial_requests_total"].counts == counts
    assert len(kinds["trial_request_seconds"].seen[other, "shadow"]) == len(shadowed)


async def test_a_stream_has_no_chunk_of_a_shadow_and_does_not_wait_for_it() -> None:
    worker = NamingWorker()
    trial = Trial(OTHER.ref.digest, 1.0, is_shadow=True)
    async with asked(retriever=TrialRetriever(trial=trial), worker=worker) as (client, served):
        worker.goes_on = asyncio.Event()
        answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        worker.goes_on.set()
        await shadows_end(served)
        text = answer.text
    assert LIVE.weights_digest in text and text.endswith("[DONE]\n\n")
    assert OTHER.weights_digest not in text and OTHER.ref.digest not in text


@pytest.mark.parametrize(("key", "most"), [("", MAX_SHADOWS), ("a", MAX_SHADOWS // 2)])
async def test_shadows_beyond_the_bound_are_dropped_and_counted(key: str, most: int, tmp_path: Path) -> None:
    worker, kinds = NamingWorker(), FakeMetrics()
    trial = Trial(OTHER.ref.digest, 1.0, is_shadow=True)
    keys = {"keys_file": write(tmp_path / "keys.json", entry(key)), "headers": bearer(key)} if key else {}
    async with asked(retriever=TrialRetriever(trial=trial), worker=worker, kinds=kinds, **keys) as (client, served):
        worker.goes_on = asyncio.Event()
        for _ in range(MAX_SHADOWS + 3):
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        worker.goes_on.set()
        await shadows_end(served)
    other = OTHER.ref.digest[:12]
    counts = kinds["trial_requests_total"].counts
    assert counts[other, "shadow", "dropped"] == MAX_SHADOWS + 3 - most
    assert counts[other, "shadow", "200"] == most


async def test_calls_that_generate_nothing_are_not_counted_for_a_version() -> None:
    kinds = FakeMetrics()
    async with asked(retriever=TrialRetriever(), worker=NamingWorker(), kinds=kinds) as (client, _):
        for path, body in (("/tokenize", CHAT), ("/tokenize", CHAT | {"model": "poet"}), ("/detokenize", TOKENS)):
            assert (await client.post(path, json=body)).status_code == 200
    assert kinds["trial_requests_total"].counts == {}
    assert kinds["trial_request_seconds"].seen == {}


class UnreachableWorkers:
    """Raises before there is a stream."""

    def stream(self, job: Job) -> AsyncIterator[Delta]:
        raise RuntimeError("no handle")


async def test_a_shadow_runs_as_the_owner_of_its_version_under_a_name_that_no_tenant_has() -> None:
    """Also where a version of another tenant is part of the mixture. Other tenants' requests do not count for it."""
    mine = PlannedAdapter(AdapterRef("acme", "code", "mine"), "w0", 0.5)
    live, tried = (PlannedAdapter(AdapterRef("globex", "poet", digest), digest, 0.5) for digest in ("live", "tried"))
    planned = Planned(Plan("mixture", (mine, live), 7), shadow=Plan("mixture", (mine, tried), 7))
    worker: Any = FakeHandle(FakeWorker())
    background = Background()
    shadows = Shadows(workers_of(serve_worker(worker)), background, RequestMetrics(FakeMetrics()))
    for sender in ("acme", "globex"):
        shadows.start([Job("r", "Rhyme", planned.plan, tenant=sender)], [planned], time.monotonic() + 60)
    await background.idle()
    tenants = [job.tenant for (job,) in worker.called("stream")]
    assert tenants == [shadow_tenant("globex", sender="acme"), shadow_tenant("globex", sender="globex")]
    assert len({*tenants, "globex", "acme"}) == 4 and not any(map(is_valid_name, tenants))
    usages = TenantUsage()
    for tenant, counted in zip(tenants, (set(), {"globex"}), strict=True):
        with usages.row(tenant):
            running = {name for name, usage in usages.read().items() if usage.num_running and is_valid_name(name)}
        assert running == counted


async def test_an_owner_leaves_places_for_the_shadows_of_others() -> None:
    background, worker = Background(), NamingWorker(goes_on=asyncio.Event())
    served: Any = FakeHandle(worker)
    metrics = RequestMetrics(FakeMetrics())
    shadows = Shadows(workers_of(serve_worker(served)), background, metrics, has_keys=True)
    for number, owner in enumerate(["acme"] * MAX_SHADOWS + ["globex"]):
        shadow = Plan("selection", (PlannedAdapter(AdapterRef(owner, "poet", owner), owner, 1.0),), 7)
        job = Job("r", "Rhyme", BASE_PLAN, tenant=owner if number % 2 else "sender")
        shadows.start([job], [Planned(BASE_PLAN, shadow=shadow)], time.monotonic() + 60)
    while len(worker.jobs) <= MAX_SHADOWS // 2:
        await asyncio.sleep(0)
    background.cancel()
    running = Counter(job.tenant for job in worker.jobs)
    assert running == {
        shadow_tenant("acme", sender="sender"): 2,
        shadow_tenant("acme", sender="acme"): 2,
        shadow_tenant("globex", sender="sender"): 1,
    }


async def test_shadows_that_cannot_start_are_counted_and_end() -> None:
    kinds = FakeMetrics()
    shadow = Plan("selection", (PlannedAdapter(OTHER.ref, OTHER.weights_digest, 1.0),), 7)
    planned = Planned(replace(shadow, adapters=(PlannedAdapter(LIVE.ref, LIVE.weights_digest, 1.0),)), shadow=shadow)
    background = Background()
    workers: Any = UnreachableWorkers()
    shadows = Shadows(workers, background, RequestMetrics(kinds))
    for number in range(MAX_SHADOWS + 1):
        shadows.start([Job(f"r{number}", "Rhyme", planned.plan)], [planned], time.monotonic() + 60)
        await background.idle()
    assert kinds["trial_requests_total"].counts == {(OTHER.ref.digest[:12], "shadow", "500"): MAX_SHADOWS + 1}
