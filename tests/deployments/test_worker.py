"""A worker replica over a fake Store: streams, probes, forgets, and reports its state."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.calls.worker_client import Usage
from deployments.errors import ReplicaStuck
from deployments.observability import worker_metrics
from deployments.observability.metrics import SERVE
from deployments.observability.worker_metrics import shadow_tenant
from deployments.scaling.residency import ResidencyReport
from deployments.worker import WorkerDeployment, import_engine
from gpu_worker.errors import AdapterLoadFailed, EngineStopped, WarmUpFailed
from gpu_worker.front.request.request import Delta, Job
from gpu_worker.model.base_model import BaseModel
from gpu_worker.native.openmp import run_on_short_lived_thread
from lora_store import AdapterNotFound, AdapterWeights
from lora_store.weights_blob import encode_weights
from tests.deployments.metric_fakes import FakeMetrics
from tests.fakes import FakeHandle
from tests.gpu_worker.engine_driver import greedy
from tests.tiny import linear_shapes, plan_of, random_adapter, tiny_config

RANK = 4


@dataclass(frozen=True)
class Held:
    """A started fetch, and the event that it waits for."""

    begun: asyncio.Event
    go_on: asyncio.Event


@dataclass
class FakeStore:
    """Blobs by digest, returned as a reference in a list."""

    blobs: dict[str, bytes]
    is_down: bool = False
    fetched: list[str] = field(default_factory=list)
    held: dict[str, Held] = field(default_factory=dict)

    def holding(self, digest: str) -> Held:
        """Make fetches of `digest` wait until they are permitted."""
        self.held[digest] = Held(asyncio.Event(), asyncio.Event())
        return self.held[digest]

    async def fetch(self, digest: str, is_suspect: bool) -> list[asyncio.Future[NDArray[np.uint8]]]:
        self.fetched.append(digest)
        if digest in self.held:
            self.held[digest].begun.set()
            await self.held[digest].go_on.wait()
        if self.is_down or digest not in self.blobs:
            raise AdapterNotFound(digest)
        ref: asyncio.Future[NDArray[np.uint8]] = asyncio.get_running_loop().create_future()
        ref.set_result(np.frombuffer(self.blobs[digest], dtype=np.uint8))
        return [ref]


async def started(*args: Any, **options: Any) -> WorkerDeployment:
    """Return a worker that has started, as Serve starts it."""
    worker = WorkerDeployment.__new__(WorkerDeployment)
    await WorkerDeployment.__init__(worker, *args, **options)
    return worker


def test_the_objects_of_the_engines_modules_are_not_looked_at_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[tuple[str, bool]] = []
    monkeypatch.delitem(sys.modules, "gpu_worker.start", raising=False)
    monkeypatch.setattr(
        "deployments.worker.check_libraries", lambda of_engine: imported.append((f"{of_engine=}", gc.isenabled()))
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: imported.append((name, gc.isenabled())))
    gc.unfreeze()
    import_engine(is_native=True)
    # The check imports transformers too, so it comes after what hides scipy.
    assert imported == [
        ("deployments.transformers_import", False),
        ("of_engine=True", False),
        ("gpu_worker.start", False),
    ]
    assert gc.get_freeze_count() > 100_000 and gc.isenabled()


async def test_a_worker_counts_its_own_usable_cpus(
    tiny_folders: Mapping[str, Path], request: pytest.FixtureRequest
) -> None:
    before, allowed = torch.get_num_threads(), os.sched_getaffinity(0)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    request.addfinalizer(lambda: os.sched_setaffinity(0, allowed))
    os.sched_setaffinity(0, {min(allowed)})
    worker = await started(tiny_config(tiny_folders["gemma3"]), FakeHandle(FakeStore({})))
    worker._engine.stop()
    assert worker._engine.loop.config.num_threads == 1


@dataclass
class Serving:
    """A worker, its store, and the store's weights."""

    worker: WorkerDeployment
    store: FakeStore
    pool: list[AdapterWeights]
    ends: list[int]  # exit codes of the worker's ended process

    def job(self, number: int, num_new: int = 30) -> Job:
        return greedy("once", plan_of("selection", (self.pool[number], 1.0)), number, num_new)

    async def text(self, job: Job) -> str:
        return "".join([delta.text async for delta in self.worker.stream(job) if isinstance(delta, Delta)])


Serve = Callable[..., AbstractAsyncContextManager[Serving]]


@pytest.fixture
def serve(tiny_folders: Mapping[str, Path], tiny_base: Callable[..., BaseModel]) -> Serve:
    """Return a maker of workers, whose engines stop at the end of the context."""
    shapes = linear_shapes(tiny_base())

    @asynccontextmanager
    async def run(
        weights_cache: tuple[Path, int] | None = None, kinds: Any = SERVE, **settings: Any
    ) -> AsyncIterator[Serving]:
        encoded = [encode_weights(random_adapter(shapes, seed, rank=RANK).modules) for seed in range(3)]
        store, ends = FakeStore(dict(encoded)), list[int]()
        threads = {"num_threads": torch.get_num_threads(), "shares_cores": False}
        worker = await started(
            tiny_config(tiny_folders["gemma3"], **threads, **settings),
            FakeHandle(store),
            weights_cache,
            stream_interval_ms=0.0,
            kinds=kinds,
            end_process=ends.append,
        )
        try:
            yield Serving(worker, store, [AdapterWeights(digest, {}) for digest, _ in encoded], ends)
        finally:
            worker._engine.stop()

    return run


@pytest.fixture
async def serving(serve: Serve) -> AsyncIterator[Serving]:
    async with serve() as served:
        yield served


async def test_a_replica_that_cannot_compute_its_first_tokens_does_not_start(
    tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = tiny_base("llama")
    with torch.no_grad():
        base.model.get_input_embeddings().weight[0] = torch.nan  # for an id that the first steps read
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WarmUpFailed, match="the first steps of the engine failed"):
        await started(tiny_config(tmp_path, num_threads=1), FakeHandle(FakeStore({})))


async def test_each_tenants_usage_is_counted_and_a_shadow_of_its_request_too(serving: Serving) -> None:
    own, for_acme = (shadow_tenant("globex", sender=sender) for sender in ("globex", "acme"))
    jobs = [replace(serving.job(0, 4), tenant=tenant) for tenant in ("acme", "acme", own, for_acme)]
    await asyncio.gather(*map(serving.text, jobs))
    usages = await serving.worker.usage()
    num_prompt_tokens = usages["globex"].num_prompt_tokens
    assert num_prompt_tokens > 0
    once = Usage(0, 1, num_prompt_tokens, 4)
    assert usages == {"acme": Usage(0, 2, 2 * num_prompt_tokens, 8), "globex": once, for_acme: once}


async def test_the_shapes_are_those_of_the_base_model(serving: Serving, tiny_base: Callable[..., BaseModel]) -> None:
    assert await serving.worker.module_shapes() == linear_shapes(tiny_base())


async def test_a_request_streams_with_the_weights_its_plan_names(serving: Serving) -> None:
    texts = await asyncio.gather(*[serving.text(serving.job(number)) for number in (0, 1, 0)])
    assert texts[0] and texts[1] and texts[0] == texts[2] != texts[1]
    assert sorted(serving.store.fetched) == sorted(w.weights_digest for w in serving.pool[:2])


async def test_missing_weights_fail_only_their_request(serving: Serving) -> None:
    missing = greedy("x", plan_of("selection", (AdapterWeights("f" * 64, {}), 1.0)), "missing")
    failed, text = await asyncio.gather(serving.text(missing), serving.text(serving.job(0)), return_exceptions=True)
    assert isinstance(failed, AdapterLoadFailed) and "withdrawn" in str(failed)
    assert text and text == await serving.text(serving.job(0))


async def test_only_requests_that_wait_for_weights_have_a_span_of_their_load(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(worker_metrics, "tracer", provider.get_tracer("test"))
    missing = greedy("x", plan_of("selection", (AdapterWeights("f" * 64, {}), 1.0)), "missing")
    for job, expected in ((serving.job(0), "store"), (serving.job(0), None), (missing, "AdapterLoadFailed")):
        exporter.clear()
        with suppress(AdapterLoadFailed):
            await serving.text(job)
        found = [dict(span.attributes or {}) for span in exporter.get_finished_spans() if span.name == "worker.load"]
        shown = [each.get("loraretriever.source", each.get("error.type")) for each in found]
        assert shown == ([] if expected is None else [expected])


def test_only_the_engine_of_a_worker_has_a_thread_team(serve: Serve) -> None:
    async def main() -> None:
        async with serve() as serving:
            await serving.text(serving.job(0, num_new=3))
            assert torch.get_num_threads() == 1
            assert await serving.worker._engine._run_on_engine(torch.get_num_threads) == 2

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_on_short_lived_thread(lambda: asyncio.run(main()))
    finally:
        torch.set_num_threads(before)


async def test_a_worker_reports_its_jobs(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    kinds, name = FakeMetrics(), "deployments.observability.worker_metrics"
    missing = greedy("x", plan_of("selection", (AdapterWeights("f" * 64, {}), 1.0)), "missing")
    with caplog.at_level(logging.INFO, name):
        async with serve(kinds=kinds) as serving:
            await asyncio.gather(serving.text(serving.job(0)), serving.text(missing), return_exceptions=True)
            await serving.text(serving.job(0))
            await serving.worker._report()
    assert len(kinds["queue_seconds"].seen[()]) == 2
    assert kinds["adapter_hits_total"].counts == {("store",): 1, ("bank",): 1}
    assert len(kinds["cold_load_seconds"].seen[("store",)]) == kinds["cold_load_failures_total"].counts[()] == 1
    assert kinds["new_tokens_total"].counts == {(): 60} and kinds["steps_total"].counts[()] >= 60
    assert sum(kinds["resident_adapters"].last.values()) == 1
    lines = [record.getMessage() for record in caplog.records if record.name == name]
    assert [line.partition(" after")[0] for line in lines if "missing" in line] == ["job missing ended (early)"]
    assert len(lines) == 3


async def test_an_adapter_is_probed_alike_alone_and_among_others(serving: Serving) -> None:
    digests = [weights.weights_digest for weights in serving.pool]
    first, *others, missing = await serving.worker.probe_many([*digests, "f" * 64])
    assert await serving.worker.probe_many(digests[:1]) == [pytest.approx(first, rel=1e-4)]
    assert all(isinstance(shift, float) and shift > 0 for shift in (first, *others))
    assert isinstance(missing, AdapterLoadFailed)


@pytest.mark.parametrize("with_disk", [False, True])
async def test_forgetting_frees_everything(with_disk: bool, serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    async with serve((folder, 10**7) if with_disk else None) as serving:
        digests = [weights.weights_digest for weights in serving.pool[:2]]
        empty = await serving.worker.load()
        assert (empty.occupied_rows, empty.host_cache_bytes, empty.free_kv_rows) == (0, 0, 8)
        await asyncio.gather(*[serving.text(serving.job(number)) for number in (0, 1)])
        full = await serving.worker.load()
        assert full.resident == set(digests) and full.occupied_rows == 2 * RANK and full.active_rows == 0
        assert all((folder / digest).exists() == with_disk for digest in digests)
        assert full.host_cache_bytes > 0
        assert (full.counters.num_requests, full.counters.num_fetches) == (2, 2)
        assert await serving.worker.forget(digests) is True
        assert await serving.worker.load() == empty
        assert not any((folder / digest).exists() for digest in digests)
        serving.store.blobs.clear()
        with pytest.raises(AdapterLoadFailed):
            await serving.text(serving.job(0))


async def test_a_running_request_keeps_forgotten_weights_to_its_end(serving: Serving) -> None:
    digest, job = serving.pool[0].weights_digest, serving.job(0, num_new=60)
    expected = await serving.text(job)
    assert expected
    deltas = serving.worker.stream(job)
    assert isinstance(await anext(deltas), ResidencyReport), "it says at once that it is there"
    parts = [(await anext(deltas)).text]
    await serving.worker.forget([digest])
    serving.store.is_down = True
    parts += [delta.text async for delta in deltas if isinstance(delta, Delta)]
    assert "".join(parts) == expected
    assert await serving.worker.forget([digest]) is True
    assert (await serving.worker.load()).resident == frozenset()


async def test_cached_weights_on_disk_survive_replica_and_store(serve: Serve, tmp_path: Path) -> None:
    cache = (tmp_path / "weights", 10**7)
    async with serve(cache) as serving:
        expected = await serving.text(serving.job(0))
    async with serve(cache) as serving:
        serving.store.is_down = True
        assert await serving.text(serving.job(0)) == expected


async def held_by(serving: Serving, job: Job, *, reads_all: bool = False) -> set[bytes]:
    """Return the short digests in the report that begins the answer, and leave or read the rest."""
    stream = serving.worker.stream(job)
    report = await anext(stream)
    if reads_all:
        assert [delta async for delta in stream if isinstance(delta, Delta)]
    await stream.aclose()
    assert isinstance(report, ResidencyReport)
    return {report.digests[start : start + 6] for start in range(0, len(report.digests), 6)}


async def test_an_answer_begins_with_what_the_worker_holds_and_waits_for(serving: Serving) -> None:
    base = greedy("once")
    digests = [bytes.fromhex(weights.weights_digest[:12]) for weights in serving.pool]
    assert await held_by(serving, base) == set()
    await serving.text(serving.job(0))
    loads = serving.store.holding(serving.pool[1].weights_digest)
    waiting = asyncio.create_task(serving.text(serving.job(1)))
    await loads.begun.wait()
    assert await held_by(serving, base) == set(digests[:2])
    assert await held_by(serving, serving.job(2)) == set(digests)
    loads.go_on.set()
    assert await waiting


@pytest.mark.parametrize("fails", [False, True])
async def test_adapters_that_the_bank_does_not_hold_leave_the_reports(serving: Serving, fails: bool) -> None:
    digests = [bytes.fromhex(weights.weights_digest[:12]) for weights in serving.pool]
    assert await serving.text(serving.job(1))
    if fails:
        serving.store.is_down = True
        with pytest.raises(AdapterLoadFailed):
            await serving.text(serving.job(0))
    else:
        await serving.text(serving.job(0))
        await serving.worker.forget([serving.pool[0].weights_digest])
    async with asyncio.timeout(120):  # the engine answers between two steps
        while await held_by(serving, serving.job(1), reads_all=not fails) != {digests[1]}:
            await asyncio.sleep(0)


async def test_autoscaling_stats_have_running_requests_and_waiting_tokens(serving: Serving) -> None:
    assert await serving.worker.record_autoscaling_stats() == {"ongoing_requests": 0, "waiting_tokens": 0}
    loads = serving.store.holding(serving.pool[1].weights_digest)
    waiting = asyncio.create_task(serving.text(serving.job(1, num_new=30)))
    await loads.begun.wait()
    stats = await serving.worker.record_autoscaling_stats()
    [row] = serving.worker._engine.loop.waiting
    assert stats == {"ongoing_requests": 1, "waiting_tokens": len(row.tokens) + 30}
    loads.go_on.set()
    assert await waiting
    assert await serving.worker.record_autoscaling_stats() == {"ongoing_requests": 0, "waiting_tokens": 0}


async def test_a_replica_whose_engine_has_ended_is_not_healthy(serving: Serving) -> None:
    serving.worker.check_health()
    assert serving.ends == []
    serving.worker._engine.stop()
    with pytest.raises(ReplicaStuck):
        serving.worker.check_health()
    assert serving.ends == [1]


async def test_a_request_that_an_ended_engine_refuses_ends_the_process_at_once(serving: Serving) -> None:
    model = serving.worker._engine.loop.base.model
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel for this device")))
    errors: list[object] = []
    for _ in range(4):
        errors += await asyncio.gather(serving.text(serving.job(0)), return_exceptions=True)
    assert [type(error) for error in errors[:2]] == [EngineStopped] * 2
    assert isinstance(errors[3], ReplicaStuck) and "compute a single token" in str(errors[3])
    assert serving.ends and set(serving.ends) == {1}


@pytest.mark.parametrize(("step_timeout_s", "ends"), [(1e-6, [1]), (3600.0, [])])
async def test_a_step_that_takes_too_long_ends_the_process(
    serve: Serve, step_timeout_s: float, ends: list[int]
) -> None:
    may_end, has_begun = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        has_begun.set()
        may_end.wait(120)

    async with serve(step_timeout_s=step_timeout_s) as serving:
        serving.worker._engine.loop.base.model.register_forward_pre_hook(hang)
        text = asyncio.create_task(serving.text(serving.job(0)))
        assert await asyncio.to_thread(has_begun.wait, 20)
        with pytest.raises(ReplicaStuck, match="a step or command of the engine has run") if ends else nullcontext():
            serving.worker.check_health()
        assert serving.ends == ends
        may_end.set()
        assert await text
