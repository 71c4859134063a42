"""Trace spans of requests. Without Serve's tracing they do nothing.

Serve creates a span for every handle call and propagates the context. This module adds what Serve cannot see: planning,
the time in the engine's queue, and generation.
"""

from __future__ import annotations

import time

from opentelemetry import context, trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from gpu_worker.request.request import Delta

tracer = trace.get_tracer("loraretriever")


def otlp() -> list[SpanProcessor]:
    """Export spans to the collector of the OTEL_EXPORTER_OTLP_* variables; for Serve's `exporter_import_path`.

    Needs the optional extra `trace`.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # in the extra `trace`

    return [BatchSpanProcessor(OTLPSpanExporter())]


class JobTrace:
    """The two spans of a job, created when it ends, because the steps of a stream may run in other contexts."""

    def __init__(self, request_id: str) -> None:
        self._request_id, self._context, self._began_ns = request_id, context.get_current(), time.time_ns()

    def end(self, last: Delta | None) -> None:
        """Create the spans. `last`: the latest delta, None if the job had none."""
        now_ns = time.time_ns()
        started_ns = now_ns if last is None else min(self._began_ns + int(last.queued_s * 1e9), now_ns)
        self._span("worker.queue", self._began_ns).end(started_ns)
        if last is not None:
            generate = self._span("worker.generate", started_ns)
            generate.set_attribute("num_prompt_tokens", last.num_prompt_tokens)
            generate.set_attribute("num_new_tokens", last.num_new_tokens)
            generate.end(now_ns)

    def _span(self, name: str, began_ns: int) -> trace.Span:
        attributes = {"request_id": self._request_id}
        return tracer.start_span(name, self._context, start_time=began_ns, attributes=attributes)
