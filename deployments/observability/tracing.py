"""Spans over the way of a request, where Serve's tracing is on; without it each of these does nothing.

Serve itself makes a span of every call through a handle, and carries the context along. Named here is what it cannot
see: planning, the wait in the engine's queue, and generating.
"""

from __future__ import annotations

import time

from opentelemetry import context, trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from gpu_worker.request.request import Delta

tracer = trace.get_tracer("loraretriever")


def otlp() -> list[SpanProcessor]:
    """For Serve's `exporter_import_path`: spans go to a collector, as the OTEL_EXPORTER_OTLP_* variables say.

    Needs the optional extra `trace`.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # the extra

    return [BatchSpanProcessor(OTLPSpanExporter())]


class JobTrace:
    """A job's two spans, made when it has ended: a stream's steps may run in other contexts than its start."""

    def __init__(self, request_id: str) -> None:
        self._request_id, self._context, self._began_ns = request_id, context.get_current(), time.time_ns()

    def end(self, last: Delta | None) -> None:
        """`last`: the latest delta; None when the job ended without any."""
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
