"""Spans kept in memory, instead of a collector."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.observability import worker_metrics
from deployments.observability.tracing import otlp, tracer
from deployments.observability.worker_metrics import JobTrace, Load
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import Delta, Job
from lora_store import AdapterRef, Plan, PlannedAdapter
from retriever_svc import RouteRequest
from tests.deployments.asking import post
from tests.deployments.fake_worker import DELTAS, FakeWorker
from tests.deployments.served_retriever import served

POET = PlannedAdapter(AdapterRef("local", "poet", "0123456789abcdef"), "weights", 1.0)
POETIC = Plan("selection", (POET,))


@pytest.fixture(scope="session")
def exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # one per process
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """Return the spans, none of which has the prompt."""
    found = exporter.get_finished_spans()
    assert not any("secret" in span.to_json() for span in found)
    return {span.name: span for span in found}


def test_a_job_that_never_ran_has_only_the_waiting_span_and_a_chat_is_named_as_one(spans: InMemorySpanExporter) -> None:
    JobTrace(Job("r1", (Message("user", "secret"),), POETIC), {}).end(None)
    assert set(by_name(spans)) == {"worker.queue"}
    assert "chat" in (by_name(spans)["worker.queue"].attributes or {}).values()


def test_planning_is_a_span_without_the_prompt_or_the_text_of_an_error(spans: InMemorySpanExporter) -> None:
    """Serve's exporters may be read by people who may not know private adapters."""
    for model, status in (("auto", 200), ("secret", 404)):
        spans.clear()
        answer = post("/v1/completions", {"prompt": "secret", "model": model}, worker=FakeWorker(DELTAS))
        assert answer.status_code == status
        [plan] = by_name(spans).values()
        assert (plan.name, plan.status.status_code is trace.StatusCode.ERROR) == ("plan", status == 404)


def test_a_job_has_a_span_for_each_part_of_its_time(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count(1_000, 10)
    monkeypatch.setattr(worker_metrics, "time", SimpleNamespace(time_ns=lambda: next(ticks), monotonic=lambda: 0.0))
    with tracer.start_as_current_span("call") as call:
        traced = JobTrace(Job("r1", "secret", POETIC), {})
    traced.answered()
    traced.answered()
    traced.end(Delta("", 5, 7, "stop", queued_s=1e-9, num_cached_tokens=3))
    found = by_name(spans)
    queue, prefill, decode = parts = [found[f"worker.{name}"] for name in ("queue", "prefill", "decode")]
    for span in parts:
        assert span.parent is not None and span.parent.span_id == call.get_span_context().span_id
        assert span.context.trace_id == call.get_span_context().trace_id
        assert span.attributes is not None and span.attributes["loraretriever.request_id"] == "r1"
        assert span.attributes["gen_ai.operation.name"] == "text_completion"
        assert span.attributes["loraretriever.adapters"] == ("0123456789ab",)
    assert queue.start_time is not None and queue.end_time == prefill.start_time == queue.start_time + 1
    times = [prefill.start_time, prefill.end_time, decode.start_time, decode.end_time]
    assert times == [1_001, 1_010, 1_010, 1_020]
    assert prefill.attributes is not None and decode.attributes is not None
    assert prefill.attributes["gen_ai.usage.input_tokens"] == 5
    assert prefill.attributes["gen_ai.usage.cache_read.input_tokens"] == 3
    assert decode.attributes["gen_ai.usage.output_tokens"] == 7
    assert decode.attributes["gen_ai.response.finish_reasons"] == ("stop",)


@pytest.mark.parametrize(
    ("load", "shown"),
    [
        (Load("store", 1_005, 1_008), (1_005, 1_008)),
        (Load("disk", 900, 1_008), (1_000, 1_008)),  # begun for an earlier job, which waits for it too
        (Load("", 1_005, 1_500), (1_005, 1_010)),
        (Load("store", 900, 1_000), None),
        (Load("store", 1_010, 1_011), None),  # for a later one, after these weights had left
    ],
)
def test_a_load_that_a_job_waits_for_is_a_span_even_if_it_outlasts_the_queue(
    load: Load, shown: tuple[int, int] | None, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count(1_000, 10)
    monkeypatch.setattr(worker_metrics, "time", SimpleNamespace(time_ns=lambda: next(ticks), monotonic=lambda: 0.0))
    traced = JobTrace(Job("r1", "secret", POETIC), {"weights": load, "others": Load("store", 1_001, 1_009)})
    traced.answered()
    traced.end(Delta("", 5, 7, "stop", queued_s=1e-9))
    found = by_name(spans)
    assert ("worker.load" in found) == (shown is not None)
    if shown is not None:
        span = found["worker.load"]
        assert (span.start_time, span.end_time) == shown
        assert span.attributes is not None and span.attributes["loraretriever.adapters"] == ("0123456789ab",)
        assert span.attributes.get("loraretriever.source", "") == load.source
        assert ("error.type" in span.attributes) == (load.source == "")


async def test_encoding_and_search_are_spans(spans: InMemorySpanExporter, tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        await here.replica.catch_up(here.publish(*await here.embedded("german", "sums")))
        await here.replica.route([RouteRequest("secret")])
    assert list(by_name(spans)) == ["retriever.encode", "retriever.search"]


def test_serve_accepts_the_exporter() -> None:
    [processor] = otlp()
    processor.shutdown()
