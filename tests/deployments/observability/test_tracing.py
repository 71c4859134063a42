"""Spans kept in memory, instead of a collector."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.observability.tracing import otlp, tracer
from deployments.observability.worker_metrics import JobTrace
from gpu_worker.front.request.request import Delta
from tests.deployments.asking import post
from tests.deployments.fake_worker import DELTAS, FakeWorker


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
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_job_has_a_span_for_waiting_and_one_for_generation(spans: InMemorySpanExporter) -> None:
    with tracer.start_as_current_span("call") as call:
        job = JobTrace("r1")
    job.end(Delta("", 5, 7, "stop", queued_s=0.0001))
    queue, generate = by_name(spans)["worker.queue"], by_name(spans)["worker.generate"]
    for span in (queue, generate):
        assert span.parent is not None and span.parent.span_id == call.get_span_context().span_id
        assert span.context.trace_id == call.get_span_context().trace_id
        assert span.attributes is not None and span.attributes["request_id"] == "r1"
    assert queue.end_time == generate.start_time and queue.start_time is not None
    assert queue.end_time - queue.start_time <= 100_000 <= generate.end_time
    assert generate.attributes == {"request_id": "r1", "num_prompt_tokens": 5, "num_new_tokens": 7}


def test_a_job_that_never_ran_has_only_the_waiting_span(spans: InMemorySpanExporter) -> None:
    JobTrace("r1").end(None)
    assert set(by_name(spans)) == {"worker.queue"}


def test_planning_is_a_span_without_the_prompt(spans: InMemorySpanExporter) -> None:
    assert post("/v1/completions", {"prompt": "secret"}, worker=FakeWorker(DELTAS)).status_code == 200
    assert set(by_name(spans)) == {"plan"}
    assert "secret" not in by_name(spans)["plan"].to_json()


def test_serve_accepts_the_exporter() -> None:
    [processor] = otlp()
    processor.shutdown()
