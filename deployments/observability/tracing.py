"""The tracer of this project, and the export of its spans. Without Serve's tracing spans do nothing.

Serve creates a span for every handle call and propagates the context. This module adds what Serve cannot see: planning,
the time in the engine's queue, and generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

tracer = trace.get_tracer("loraretriever")


@contextmanager
def open_span(name: str) -> Iterator[None]:
    """Run the block in a span. Of an error it has the class only: the text may name adapters or quote the request."""
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        try:
            yield
        except Exception as exc:
            span.set_status(trace.StatusCode.ERROR, type(exc).__name__)
            raise


def otlp() -> list[SpanProcessor]:
    """Export spans to the collector of the OTEL_EXPORTER_OTLP_* variables; for Serve's `exporter_import_path`.

    Needs the optional extra `trace`.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # in the extra `trace`

    return [BatchSpanProcessor(OTLPSpanExporter())]
