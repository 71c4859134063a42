"""An Ingress replica's figures of requests and of changes of the pool, and one line of the log for each request."""

from __future__ import annotations

import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from deployments.api import error_table
from deployments.observability.metrics import SECONDS, SERVE, SHORT_SECONDS, MetricFactory
from deployments.observability.request_record import RequestRecord

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RequestMetrics:
    """Each request is told once, when it has ended."""

    def __init__(self, kinds: MetricFactory = SERVE) -> None:
        self._requests = kinds.Counter(
            "loraretriever_requests_total",
            "Requests by route, HTTP status (499: the client left) and strategy",
            ("route", "status", "strategy"),
        )
        self._refusals = kinds.Counter("loraretriever_refusals_total", "Errors by the API's code", ("code",))
        by_strategy = ("strategy",)
        self._total_s = kinds.Histogram(
            "loraretriever_request_seconds", "From arrival to the last token", SECONDS, by_strategy
        )
        self._first_s = kinds.Histogram(
            "loraretriever_first_token_seconds", "From arrival to the first token", SECONDS, by_strategy
        )
        self._token_s = kinds.Histogram(
            "loraretriever_inter_token_seconds", "Between two tokens, the mean of an answer", SHORT_SECONDS, by_strategy
        )
        self._plan_s = kinds.Histogram("loraretriever_plan_seconds", "From prompts to plans", SHORT_SECONDS)

    @contextmanager
    def called(self, record: RequestRecord) -> Iterator[RequestRecord]:
        """A request that came through a Ray handle is answered within."""
        try:
            yield record
            record.status = 200
        except Exception as exc:
            record.status, body = error_table.describe(exc)
            record.code = body["error"]["code"]
            raise
        finally:
            self.ended(record)

    def ended(self, record: RequestRecord) -> None:
        total_s = time.monotonic() - record.began
        labels = {"route": record.route, "status": str(record.status), "strategy": record.strategy}
        self._requests.inc(1, labels)
        if record.code:
            self._refusals.inc(1, {"code": record.code})
        if record.plan_s is not None:
            self._plan_s.observe(record.plan_s)
        if record.first_token_s is not None:
            self._observe_times(record, total_s)
        _log(record, total_s)

    def _observe_times(self, record: RequestRecord, total_s: float) -> None:
        by_strategy = {"strategy": record.strategy}
        assert record.first_token_s is not None
        self._total_s.observe(total_s, by_strategy)
        self._first_s.observe(record.first_token_s, by_strategy)
        for row in record.rows.values():
            if row.token_s is not None:
                self._token_s.observe(row.token_s, by_strategy)


class ChangeFigures:
    """Changes of the pool: of many adapters at once, each is one."""

    def __init__(self, kinds: MetricFactory = SERVE) -> None:
        self._changes = kinds.Counter(
            "loraretriever_pool_changes_total", "Changes of the pool: `ok`, or the API's code", ("change", "outcome")
        )

    async def counted(self, change: str, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; a list of it may hold errors."""
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


def _log(record: RequestRecord, total_s: float) -> None:
    """The same in words and, for JSON, in fields."""
    told = {
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
    words = " ".join(f"{name}={value}" for name, value in told.items() if value not in (None, "", "none", [], False))
    logger.info("request %s", words, extra=told)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
