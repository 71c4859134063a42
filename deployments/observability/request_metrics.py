"""The metrics and the log line of a request that has ended: never its prompt, and no adapter's name."""

from __future__ import annotations

import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

from deployments.api import error_table
from deployments.api.base import HARMLESS
from deployments.observability.metrics import OTHER, SECONDS, SERVE, SHORT_SECONDS, MetricFactory
from deployments.observability.request_context import RequestContext, RowTimes

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_TRIED_VERSIONS = 64  # with labels of their own, whose series stay until the replica ends


class RequestMetrics:
    """Records each request once, when it has ended."""

    def __init__(self, factory: MetricFactory = SERVE, *, max_tenants: int = 0) -> None:
        """`max_tenants`: how many tenants have labels of their own; the first ones that send a request."""
        self._max_tenants = max_tenants
        self._named_tenants: set[str] = set()
        self._tried_versions: set[str] = set()
        self._tenants = factory.Counter(
            "loraretriever_tenant_usage_total",
            "Requests and tokens (prompt, cached, new) by tenant, with the setting `tenant_metrics`",
            ("tenant", "kind"),
        )
        self._requests = factory.Counter(
            "loraretriever_requests_total",
            "Requests by route, HTTP status (499: client closed the connection) and strategy",
            ("route", "status", "strategy"),
        )
        self._refusals = factory.Counter("loraretriever_errors_total", "Errors by code", ("code",))
        self._ignored = factory.Counter(
            "loraretriever_ignored_fields_total",
            "Requests with a field that was ignored, by field; `other` where the field is not widely known",
            ("field",),
        )
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

        self._versions = factory.Counter(
            "loraretriever_trial_requests_total",
            "Requests to names under trial by version, role (live, trial or shadow) and HTTP status",
            ("digest", "role", "status"),
        )
        self._versions_s = factory.Histogram(
            "loraretriever_trial_request_seconds",
            "Time from arrival to the last token of requests to names under trial, by version",
            SECONDS,
            ("digest", "role"),
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
        for name in {path if path in HARMLESS else "other" for path in record.ignored}:
            self._ignored.inc(1, {"field": name})
        for digest, role in record.versions:
            self.record_version(digest, role, str(record.status), total_s)
        if self._max_tenants and record.caller is not None:
            self._count_tenant(record)
        if record.plan_s is not None:
            self._plan_s.observe(record.plan_s)
        if record.first_token_s is not None:
            self._observe_times(record, total_s)
        _log(record, total_s)

    def record_version(self, digest: str, role: str, status: str, seconds: float | None) -> None:
        """Record that a version answered a request to a name under trial; without `seconds` it did not run."""
        if len(self._tried_versions) < MAX_TRIED_VERSIONS:
            self._tried_versions.add(digest)
        digest = digest if digest in self._tried_versions else OTHER
        self._versions.inc(1, {"digest": digest, "role": role, "status": status})
        if seconds is not None:
            self._versions_s.observe(seconds, {"digest": digest, "role": role})

    def _count_tenant(self, record: RequestContext) -> None:
        if len(self._named_tenants) < self._max_tenants:
            self._named_tenants.add(record.tenant)
        tenant = record.tenant if record.tenant in self._named_tenants else OTHER
        for kind, count in zip(("requests", "prompt", "cached", "new"), (1, *record.num_tokens), strict=True):
            if count:
                self._tenants.inc(count, {"tenant": tenant, "kind": kind})

    def _observe_times(self, record: RequestContext, total_s: float) -> None:
        by_strategy = {"strategy": record.strategy}
        assert record.first_token_s is not None
        self._total_s.observe(total_s, by_strategy)
        self._first_s.observe(record.first_token_s, by_strategy)
        for row in record.rows.values():
            if (token_s := _mean_token_s(row)) is not None:
                self._token_s.observe(token_s, by_strategy)


def _mean_token_s(row: RowTimes) -> float | None:
    """Return the mean time between two tokens; None if the whole answer arrived at once."""
    more = row.last.num_new_tokens - row.first_tokens
    return (row.last_at - row.first_at) / more if more > 0 else None


class ChangeMetrics:
    """Counts changes of the pool, one for each adapter."""

    def __init__(self, factory: MetricFactory = SERVE) -> None:
        self._changes = factory.Counter(
            "loraretriever_pool_changes_total",
            "Changes of the pool by outcome: `ok` or an error code",
            ("change", "outcome"),
        )

    async def count(self, change: str, work: Coroutine[object, object, T]) -> T:
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
        code = error_table.as_reported(outcome).code if isinstance(outcome, Exception) else "ok"
        self._changes.inc(1, {"change": change, "outcome": code})


def _log(record: RequestContext, total_s: float) -> None:
    """Log the record as text and, for JSON logs, as fields."""
    num_prompt, num_cached, num_new = record.num_tokens
    fields = {
        "request_id": record.request_id,
        "tenant": record.tenant,
        "key": "" if record.caller is None else record.caller.key_id,
        "method": record.method,
        "endpoint": record.route,
        "status": record.status,
        "code": record.code,
        "strategy": record.strategy,
        "adapters": list(record.adapters),
        "abstained": record.abstained,
        "prompt_tokens": num_prompt,
        "cached_tokens": num_cached,
        "new_tokens": num_new,
        "plan_s": _rounded(record.plan_s),
        "queued_s": _rounded(record.queued_s),
        "first_token_s": _rounded(record.first_token_s),
        "total_s": _rounded(total_s),
    }
    text = " ".join(f"{name}={value}" for name, value in fields.items() if value not in (None, "", "none", [], False))
    logger.info("request %s", text, extra=fields)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
