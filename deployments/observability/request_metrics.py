"""Metrics of requests and of pool changes in an Ingress replica, and one log line per request."""

from __future__ import annotations

import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from deployments.api import error_table
from deployments.observability.metrics import SECONDS, SERVE, SHORT_SECONDS, MetricFactory
from deployments.observability.request_context import RequestContext

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RequestMetrics:
    """Records each request once, when it has ended."""

    def __init__(self, factory: MetricFactory = SERVE) -> None:
        self._requests = factory.Counter(
            "loraretriever_requests_total",
            "Requests by route, HTTP status (499: client closed the connection) and strategy",
            ("route", "status", "strategy"),
        )
        self._refusals = factory.Counter("loraretriever_errors_total", "Errors by code", ("code",))
        by_strategy = ("strategy",)
        self._total_s = factory.Histogram(
            "loraretriever_request_seconds", "Time from arrival to the last token", SECONDS, by_strategy
        )
        self._first_s = factory.Histogram(
            "loraretriever_first_token_seconds", "Time from arrival to the first token", SECONDS, by_strategy
        )
        self._token_s = factory.Histogram(
            "loraretriever_inter_token_seconds", "Mean time between two tokens of an answer", SHORT_SECONDS, by_strategy
        )
        self._plan_s = factory.Histogram(
            "loraretriever_plan_seconds", "Time to retrieve adapters and plan", SHORT_SECONDS
        )

    @contextmanager
    def record_call(self, record: RequestContext) -> Iterator[RequestContext]:
        """Record a request of a Ray handle that is answered in the context."""
        try:
            yield record
            record.status = 200
        except Exception as exc:
            record.status, body = error_table.describe(exc)
            record.code = body["error"]["code"]
            raise
        finally:
            self.record_request(record)

    def record_request(self, record: RequestContext) -> None:
        """Record a request that has ended."""
        total_s = time.monotonic() - record.arrived_at
        labels = {"route": record.route, "status": str(record.status), "strategy": record.strategy}
        self._requests.inc(1, labels)
        if record.code:
            self._refusals.inc(1, {"code": record.code})
        if record.plan_s is not None:
            self._plan_s.observe(record.plan_s)
        if record.first_token_s is not None:
            self._observe_times(record, total_s)
        _log(record, total_s)

    def _observe_times(self, record: RequestContext, total_s: float) -> None:
        by_strategy = {"strategy": record.strategy}
        assert record.first_token_s is not None
        self._total_s.observe(total_s, by_strategy)
        self._first_s.observe(record.first_token_s, by_strategy)
        for row in record.rows.values():
            if row.token_s is not None:
                self._token_s.observe(row.token_s, by_strategy)


class ChangeMetrics:
    """Counts changes of the pool, one for each adapter."""

    def __init__(self, factory: MetricFactory = SERVE) -> None:
        self._changes = factory.Counter(
            "loraretriever_pool_changes_total",
            "Changes of the pool by outcome: `ok` or an error code",
            ("change", "outcome"),
        )

    async def count(self, change: str, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, count its outcome, and return its result. Errors in a list are counted one by one."""
        try:
            result = await work
        except Exception as exc:
            self._count(change, exc)
            raise
        for outcome in result if isinstance(result, list) else [result]:
            self._count(change, outcome)
        return result

    def _count(self, change: str, outcome: object) -> None:
        code = error_table.code_of(outcome) if isinstance(outcome, Exception) else "ok"
        self._changes.inc(1, {"change": change, "outcome": code})


def _log(record: RequestContext, total_s: float) -> None:
    """Log the record as text and, for JSON logs, as fields."""
    fields = {
        "request_id": record.request_id,
        "method": record.method,
        "endpoint": record.route,
        "status": record.status,
        "code": record.code,
        "strategy": record.strategy,
        "adapters": list(record.adapters),
        "abstained": record.abstained,
        "prompt_tokens": record.num_prompt_tokens,
        "new_tokens": record.num_new_tokens,
        "plan_s": _rounded(record.plan_s),
        "queued_s": _rounded(record.queued_s),
        "first_token_s": _rounded(record.first_token_s),
        "total_s": _rounded(total_s),
    }
    text = " ".join(f"{name}={value}" for name, value in fields.items() if value not in (None, "", "none", [], False))
    logger.info("request %s", text, extra=fields)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
