"""The tracer of this project, and the export of its spans. Without Serve's tracing spans do nothing.

Serve creates a span for every handle call and propagates the context. This module adds what Serve cannot see: planning,
the time in the engine's queue, and generation.
"""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

tracer = trace.get_tracer("loraretriever")


def otlp() -> list[SpanProcessor]:
    """Export spans to the collector of the OTEL_EXPORTER_OTLP_* variables; for Serve's `exporter_import_path`.

    Needs the optional extra `trace`.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # in the extra `trace`

    return [BatchSpanProcessor(OTLPSpanExporter())]
