from __future__ import annotations

from dataclasses import fields, replace

import pytest

from deployments.calls.worker_client import Usage
from deployments.observability import worker_metrics
from deployments.observability.worker_metrics import COUNTER_METRICS, TenantUsage, WorkerMetrics, count_tokens
from gpu_worker.front.engine_status import Counters
from gpu_worker.front.request.request import Delta
from tests.deployments.console_fakes import HOLDINGS
from tests.deployments.metric_fakes import FakeMetrics

HELD = replace(
    HOLDINGS,
    occupied_rows=12,
    kv_tokens=70,
    num_threads=2,
    counters=replace(HOLDINGS.counters, num_prompt_tokens=0, step_s=1.5),
)


def test_every_counter_of_the_engine_is_reported_or_explicitly_omitted() -> None:
    assert set(COUNTER_METRICS) == {field.name for field in fields(Counters)}


def test_gauges_report_the_current_state() -> None:
    kinds = FakeMetrics()
    metrics = WorkerMetrics(16, kinds)
    metrics.report_status(HELD)
    metrics.report_step_age(0.25)
    metrics.report_missing_kernels(2)
    assert kinds["missing_kernels"].last[()] == 2
    single = ("running_rows", "waiting_rows", "host_cache_bytes", "kv_free_rows", "kv_tokens", "kv_free_tokens")
    assert [kinds[name].last[()] for name in single] == [3, 2, 5_000_000, 29, 70, 59_000]
    assert kinds["prefix_cache_tokens"].last[()] == 320
    assert kinds["threads"].last[()] == 2
    assert kinds["step_age_seconds"].last[()] == 0.25
    assert kinds["bank_rows"].last == {("active",): 8, ("idle",): 4, ("free",): 4}
    assert kinds["resident_adapters"].last == {(): 2}
    metrics.report_status(replace(HELD, resident=frozenset("b")))
    assert kinds["resident_adapters"].last == {(): 1}, "one left the bank"


def test_counters_increase_by_the_engines_work_since_the_last_report() -> None:
    kinds = FakeMetrics()
    metrics = WorkerMetrics(16, kinds)
    metrics.report_status(HELD)
    metrics.report_status(HELD)
    later = replace(HELD.counters, num_new_tokens=430, step_s=2.0, num_fetches=2, num_evicted_blocks=7)
    metrics.report_status(replace(HELD, counters=later))
    assert kinds["new_tokens_total"].counts == {(): 430}
    assert kinds["step_seconds_total"].counts == {(): 2.0}
    assert kinds["prefix_cache_hit_tokens_total"].counts == {(): 32}
    assert kinds["prefix_cache_evictions_total"].counts == {(): 7}
    assert kinds["engine_requests_total"].counts == {(): 10}
    assert kinds["prompt_tokens_total"].counts == {}, "Ray refuses to add nothing"
    assert kinds["adapter_hits_total"].counts == {("bank",): 6, ("host",): 3}


def test_a_fetch_counts_under_its_source() -> None:
    kinds = FakeMetrics()
    metrics = WorkerMetrics(16, kinds)
    metrics.loaded("a", "disk", 0.1)
    metrics.loaded("b", "store", 0.7)
    metrics.loaded("a", "store", 0.9)
    metrics.load_failed("c", 60.0)
    assert kinds["adapter_hits_total"].counts == {("disk",): 1, ("store",): 2}
    assert kinds["cold_load_seconds"].seen == {("disk",): [0.1], ("store",): [0.7, 0.9]}
    assert kinds["cold_load_failures_total"].counts == {(): 1}
    assert [(digest, load.source) for digest, load in metrics.loads.items()] == [
        ("b", "store"),
        ("a", "store"),
        ("c", ""),
    ]
    assert metrics.loads["c"].ended_ns - metrics.loads["c"].began_ns == 60 * 10**9


def test_only_the_last_loads_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_metrics, "_MAX_LOADS", 2)
    metrics = WorkerMetrics(16, FakeMetrics())
    for digest in "abac":
        metrics.loaded(digest, "store", 0.1)
    assert list(metrics.loads) == ["a", "c"]


def test_tokens_count_as_they_arrive_and_a_row_runs_until_its_end() -> None:
    usages = TenantUsage()
    with usages.row("acme") as first, usages.row("acme") as second, usages.row("globex"):
        begun = Delta("a", 5, 1)
        count_tokens(first, begun, None)
        count_tokens(first, Delta("b", 5, 3), begun)
        count_tokens(second, Delta("c", 7, 2), None)
        during = usages.read()
    assert during == {"acme": Usage(2, 2, 12, 5), "globex": Usage(1, 1, 0, 0)}, "what was read does not change"
    assert usages.read() == {"acme": Usage(0, 2, 12, 5), "globex": Usage(0, 1, 0, 0)}


def test_a_row_that_fails_runs_no_longer() -> None:
    usages = TenantUsage()
    with pytest.raises(KeyError), usages.row("acme"):
        raise KeyError
    assert usages.read() == {"acme": Usage(0, 1, 0, 0)}


def test_the_least_recently_active_tenant_is_forgotten() -> None:
    usages = TenantUsage(max_tenants=2)
    for tenant in ("a", "b", "a", "c"):
        with usages.row(tenant):
            pass
    assert usages.read().keys() == {"a", "c"}
