"""Metrics and log lines of requests, for every outcome."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.api.error_table import HTTP_ERROR, reported_errors
from deployments.errors import RequestInvalid
from deployments.observability.metrics import OTHER
from deployments.observability.request_metrics import RequestMetrics
from gpu_worker.errors import EngineFull
from gpu_worker.front.request.request import Delta
from tests.deployments.app_fakes import POOL, FakeRetriever, FakeWorker, Served, serve_plainly
from tests.deployments.asking import asked
from tests.deployments.key_files import bearer, entry, write
from tests.deployments.metric_fakes import FakeMetrics

SECRET = "the-secret-prompt"
CHAT = {"messages": [{"role": "user", "content": SECRET}]}
CHAT_ROUTE = "/v1/chat/completions"
DIGESTS = [record.ref.digest[:12] for record in POOL]
BROKEN = [Delta("a", 5, 1), EngineFull("full")]


@asynccontextmanager
async def recorded(
    caplog: pytest.LogCaptureFixture, **options: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Served, FakeMetrics]]:
    """Yield a client, its server and the metrics. No log line of any kind may contain the prompt."""
    kinds = FakeMetrics()
    with caplog.at_level(logging.DEBUG):
        async with asked(kinds=kinds, **options) as (client, served):
            yield client, served, kinds
    assert SECRET not in caplog.text and not any(SECRET in str(vars(record)) for record in caplog.records)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the log lines of requests."""
    return [record for record in caplog.records if record.name == "deployments.observability.request_metrics"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answered_request(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    worker = FakeWorker([Delta("Hel", 5, 1, queued_s=0.25), Delta("lo", 5, 3, "stop", queued_s=0.25)])
    async with recorded(caplog, worker=worker) as (client, served, kinds):
        await client.post(CHAT_ROUTE, json=CHAT | {"stream": stream}, headers={"x-request-id": "mine-1"})
        assert served.job.request_id == "mine-1"
    [line] = lines_of(caplog)
    assert kinds["requests_total"].counts == {(CHAT_ROUTE, "200", "mixture"): 1}
    assert kinds["errors_total"].counts == {}
    for name in ("request_seconds", "first_token_seconds", "inter_token_seconds"):
        [value] = kinds[name].seen[("mixture",)]
        assert value > 0
    assert len(kinds["plan_seconds"].seen[()]) == 1
    fields = vars(line)
    assert (fields["tenant"], fields["key"]) == ("local", "local") and " tenant=local key=local " in line.getMessage()
    assert [fields[name] for name in ("request_id", "endpoint", "method", "status", "strategy", "adapters")] == [
        "mine-1",
        CHAT_ROUTE,
        "POST",
        200,
        "mixture",
        DIGESTS,
    ]
    assert (fields["prompt_tokens"], fields["new_tokens"], fields["queued_s"]) == (5, 3, 0.25)
    assert 0 <= fields["plan_s"] <= fields["first_token_s"] <= fields["total_s"]
    assert "request_id=mine-1" in line.getMessage() and "code=" not in line.getMessage()


async def test_ignored_fields_are_counted_once_by_request_and_unknown_names_together(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with recorded(caplog) as (client, _, kinds):
        await client.post(CHAT_ROUTE, json=CHAT | {SECRET: 1, "other_field": 2, "verbosity": "low"})
    assert kinds["ignored_fields_total"].counts == {("other",): 1, ("verbosity",): 1}


@pytest.mark.parametrize(
    ("body", "options", "status", "code"),
    [
        (CHAT | {"model": "nobody"}, {}, "404", "model_not_found"),
        (CHAT | {"temperature": -1}, {}, "400", "invalid_request"),
        ({"messages": SECRET}, {}, "400", "invalid_request"),
        (CHAT | {SECRET: 1}, {"strict_fields": True}, "400", "invalid_request"),
        (CHAT, {"worker": FakeWorker([EngineFull("full")])}, "503", "overloaded"),
        (CHAT, {"worker": FakeWorker(BROKEN)}, "503", "overloaded"),
        (CHAT | {"stream": True}, {"worker": FakeWorker(BROKEN)}, "200", "overloaded"),
        (CHAT, {"worker": FakeWorker([RuntimeError("what")])}, "500", "internal_error"),
        (CHAT, {"max_concurrent_requests": 1, "is_full": True}, "429", "overloaded"),
    ],
    ids=["unknown model", "value", "type", "key", "full", "broken", "broken stream", "unforeseen", "overload"],
)
async def test_a_refused_request_counts_by_its_code(
    body: Any, options: dict[str, Any], status: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = dict(options)
    is_full = options.pop("is_full", False)
    async with recorded(caplog, **options) as (client, served, kinds):
        with served.services.in_flight.place("another tenant") if is_full else nullcontext():
            assert (await client.post(CHAT_ROUTE, json=body)).status_code == int(status)
    [line] = lines_of(caplog)
    [(labels, count)] = kinds["requests_total"].counts.items()
    assert (labels[1], count) == (status, 1)
    assert kinds["errors_total"].counts == {(code,): 1}
    assert vars(line)["code"] == code


async def test_labels_are_bounded_for_any_request(caplog: pytest.LogCaptureFixture) -> None:
    paths = ["/nowhere", "/v1/models/a", "/v1/models/b", "/v1/loras/x/y", "/v1/loras/a", "/a%0Ab", "/health", "/ready"]
    async with recorded(caplog) as (client, _, kinds):
        for path in paths:
            for _ in range(2):
                await client.get(path)
    lines = lines_of(caplog)
    counted = kinds["requests_total"].counts
    assert {labels[0] for labels in counted} == {"none", "/v1/models/{model:path}", "/v1/loras/{name:path}"}
    assert sum(counted.values()) == len(lines) == 2 * (len(paths) - 2), "probes are not reported"
    assert {code for (code,) in kinds["errors_total"].counts} <= {error.code for error in reported_errors()} | {
        HTTP_ERROR
    }


def test_only_the_first_versions_under_trial_have_labels_of_their_own() -> None:
    kinds = FakeMetrics()
    metrics = RequestMetrics(kinds)
    for number in [*range(1000), 0]:
        metrics.record_version(f"{number:012x}", "trial", "200", 1.0)
    counts = kinds["trial_requests_total"].counts
    assert (len(counts), counts["0" * 12, "trial", "200"], counts[OTHER, "trial", "200"]) == (65, 2, 936)
    assert len(kinds["trial_request_seconds"].seen) == 65


async def test_an_id_that_is_not_plain_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async with recorded(caplog) as (client, served, _):
        for given in ("a b", "x" * 65, "é", ""):
            await client.post(CHAT_ROUTE, json=CHAT, headers={"x-request-id": given.encode()})
            assert len(served.worker.called("stream")[-1][0].request_id) == 32


async def test_an_abstention_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async with recorded(caplog, retriever=FakeRetriever(abstains=True)) as (client, _, kinds):
        await client.post(CHAT_ROUTE, json=CHAT)
    [line] = lines_of(caplog)
    assert kinds["requests_total"].counts == {(CHAT_ROUTE, "200", "base"): 1}
    assert vars(line)["abstained"] is True and vars(line)["adapters"] == []


async def test_calls_through_a_handle_are_reported_too(caplog: pytest.LogCaptureFixture) -> None:
    kinds = FakeMetrics()
    with caplog.at_level(logging.INFO):
        served = serve_plainly(kinds=kinds)
        await served.ingress.generate(CHAT)
        async for _ in served.ingress.stream(CHAT):
            pass
        with pytest.raises(RequestInvalid):
            await served.ingress.generate({"messages": SECRET})
    assert kinds["requests_total"].counts == {
        ("generate", "200", "mixture"): 1,
        ("stream", "200", "mixture"): 1,
        ("generate", "400", "none"): 1,
    }
    assert kinds["errors_total"].counts == {("invalid_request",): 1}
    assert SECRET not in caplog.text


async def test_changes_of_the_pool_count_one_by_one(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    folders = [tmp_path / name for name in ("fine", "bad", "taken", "fine-too")]
    for folder in folders:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    async with recorded(caplog) as (client, _, kinds):
        body = {"adapters": [{"path": str(folder)} for folder in folders]}
        assert (await client.post("/v1/loras", json=body)).status_code == 207
        assert (await client.delete("/v1/loras/poet")).status_code == 200
        assert (await client.delete("/v1/loras/poet")).status_code == 404
    assert kinds["pool_changes_total"].counts == {
        ("publish", "ok"): 2,
        ("publish", "adapter_refused"): 1,
        ("publish", "name_taken"): 1,
        ("withdraw", "ok"): 1,
        ("withdraw", "model_not_found"): 1,
    }


async def test_only_the_first_tenants_have_counters_of_their_own(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    keys = write(tmp_path / "keys.json", *[entry(name, name) for name in ("a", "b", "c")])

    async def counts_of(**options: Any) -> Any:
        async with recorded(caplog, keys_file=keys, **options) as (client, _, kinds):
            for name in "abcab":
                await client.post(CHAT_ROUTE, json=CHAT, headers=bearer(name))
        return kinds["tenant_usage_total"].counts

    worker = FakeWorker([Delta("Hi", 5, 2, "stop", num_cached_tokens=4)])
    counts = await counts_of(worker=worker, tenant_metrics=2)
    assert {tenant: counts[tenant, "requests"] for tenant, _ in counts} == {"a": 2, "b": 2, "(other)": 1}
    assert [counts["a", kind] for kind in ("prompt", "cached", "new")] == [10, 8, 4]
    assert await counts_of() == {}
