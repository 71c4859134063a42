"""One event for each request, on the disk before its answer ends, and sent once whatever dies."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from deployments.auth.authenticator import LOCAL_CALLER, Authenticator
from deployments.http.middleware import RequestContextMiddleware
from deployments.http.routes import status
from deployments.http.scope import find_context
from deployments.json_types import JsonObject
from deployments.observability.request_context import RequestContext
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.usage import UsageLog
from gpu_worker.errors import EngineFull
from gpu_worker.front.request.request import Delta
from lora_store import StoreUnavailable, usage
from lora_store.usage import UsageQuery, parse_events
from tests.deployments.adapter_records import BASE, POOL
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import asked
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import FakeWorker
from tests.deployments.key_files import bearer, entry, write
from tests.deployments.metric_fakes import FakeMetrics

SECRET = "the-secret-prompt"
CHAT = {"messages": [{"role": "user", "content": SECRET}]}


def events_in(folder: Path) -> list[dict[str, Any]]:
    """Return the events in the segments of this machine. None may hold the prompt."""
    contents = [path.read_bytes() for path in folder.rglob("*.jsonl")]
    assert not any(SECRET.encode() in content for content in contents)
    return [event for content in contents for event in parse_events("s", content)]


class Pool:
    """Takes segments."""

    def __init__(self) -> None:
        self.segments: dict[str, bytes] = {}
        self.is_away = False

    async def put(self, segment: str, lines: bytes) -> None:
        if self.is_away:
            raise StoreUnavailable("it is away")
        self.segments[segment] = lines

    @property
    def ids(self) -> list[str]:
        return sorted(
            event["request_id"] for name, lines in self.segments.items() for event in parse_events(name, lines)
        )


def context(request_id: str) -> RequestContext:
    return RequestContext(request_id, "/v1/completions", "POST", caller=LOCAL_CALLER)


async def test_an_event_has_who_asked_for_what_and_its_tokens(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("k"))
    worker = FakeWorker([Delta("Hel", 5, 1, queued_s=0.25, num_cached_tokens=4), Delta("lo", 5, 3, "stop")])
    async with asked(keys_file=keys, headers=bearer("k"), worker=worker, cache_dir=tmp_path) as (client, _):
        body = CHAT | {"n": 2, "model": "auto"}
        answer = (await client.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})).json()
    [event] = events_in(tmp_path)
    usage = answer["usage"]
    assert [event[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens")] == [
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["completion_tokens"],
    ]
    wanted = {"request_id": "mine", "tenant": "acme", "key": "id-k", "route": "/v1/chat/completions", "model": "auto"}
    assert event | wanted | {"base": BASE, "status": 200, "code": ""} == event
    assert [(used["name"], used["digest"]) for used in event["adapters"]] == [
        (f"{record.ref.tenant}/{record.ref.name}", record.ref.digest) for record in POOL
    ]
    assert sum(used["weight"] for used in event["adapters"]) == pytest.approx(1)
    assert 0 < event["first_token_s"] <= event["total_s"]


@pytest.mark.parametrize(
    ("worker", "path", "status"),
    [
        ([EngineFull("full")] * 9, "/v1/chat/completions", 503),
        ([Delta("a", 5, 1), EngineFull("full")], "/v1/chat/completions", 200),
        (None, "/v1/unknown", 404),
    ],
    ids=["refused", "cut off", "no such route"],
)
async def test_a_request_that_fails_is_recorded_with_its_status(
    worker: list[Any] | None, path: str, status: int, tmp_path: Path
) -> None:
    async with asked(worker=None if worker is None else FakeWorker(worker), cache_dir=tmp_path) as (client, _):
        response = await client.post(path, json=CHAT | {"stream": True})
        assert response.status_code == status
    [event] = events_in(tmp_path)
    assert event["status"] == status and event["code"]


@pytest.mark.parametrize("chunk", [b"[DONE]", b'"usage"'])
async def test_a_stream_is_recorded_before_the_client_can_take_it_for_complete(chunk: bytes, tmp_path: Path) -> None:
    served = serve_plainly(cache_dir=tmp_path)
    seen: list[tuple[bool, int]] = []
    async with http_of(served) as client:
        app = client._transport.app  # type: ignore[attr-defined]

        async def watching(scope: Any, receive: Any, send: Any) -> None:
            async def watched(message: Any) -> None:
                seen.append((chunk in message.get("body", b""), len(events_in(tmp_path))))
                await send(message)

            await app(scope, receive, watched)

        client._transport.app = watching  # type: ignore[attr-defined]
        body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
        await client.post("/v1/chat/completions", json=body)
    assert [number for has_chunk, number in seen if has_chunk] == [1]
    assert seen[0][1] == 0 and len(events_in(tmp_path)) == 1


async def test_a_client_that_leaves_is_charged_what_it_got(tmp_path: Path) -> None:
    served = serve_plainly(cache_dir=tmp_path, worker=FakeWorker([Delta("a", 5, 1), Delta("b", 5, 2)]))
    chunks: AsyncIterator[Any] = served.ingress.stream(CHAT)
    await anext(chunks)
    await anext(chunks)
    await chunks.aclose()  # type: ignore[attr-defined]
    [event] = events_in(tmp_path)
    assert (event["status"], event["prompt_tokens"], event["completion_tokens"]) == (499, 5, 1)


async def test_reads_and_requests_without_a_caller_are_not_recorded_and_others_once(tmp_path: Path) -> None:
    log = UsageLog(tmp_path, BASE, Pool().put)
    log.record(RequestContext("read", "/v1/loras", "GET", caller=LOCAL_CALLER))
    log.record(RequestContext("nobody", "/", "POST"))
    once = context("once")
    log.record(once)
    log.record(once)
    log.close()
    assert [event["request_id"] for event in events_in(tmp_path)] == ["once"]


async def test_events_that_wait_for_another_store_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, now = (UsageLog(tmp_path / name, BASE, Pool().put) for name in ("before", "now"))
    before.record(context("one"))
    before.close()
    sending = asyncio.create_task(now.keep_sending())
    await asyncio.sleep(0)
    sending.cancel()
    [message] = caplog.messages
    assert message.startswith("1 usage files") and message.endswith(f"move them to {tmp_path / 'now'}")


async def test_events_are_sent_while_the_folders_of_other_stores_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool()
    log = UsageLog(tmp_path / "own", BASE, pool.put)
    log.record(context("one"))
    glob = Path.glob

    def fail_for_others(self: Path, pattern: str) -> Iterator[Path]:
        if self == tmp_path:
            raise OSError(errno.ESTALE, "Stale file handle")
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", fail_for_others)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await log.keep_sending()
    assert pool.ids == ["one"] and "Stale file handle" in caplog.text


async def test_events_of_a_killed_process_are_sent_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    script = """
import asyncio, pathlib, sys
from deployments.auth.authenticator import LOCAL_CALLER
from deployments.observability.request_context import RequestContext
from deployments.observability.usage import UsageLog
async def main():
    log = UsageLog(pathlib.Path(sys.argv[1]), "base", None)
    for name in ("one", "two"):
        log.record(RequestContext(name, "/v1/completions", "POST", caller=LOCAL_CALLER))
    print("written", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    pool = Pool()

    async def send() -> None:
        log = UsageLog(tmp_path, BASE, pool.put)
        log.record(context("own"))
        await log.send_all()

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "written\n"
            await send()
            assert pool.ids == ["own"]
        finally:
            other.kill()
    await send()
    assert pool.ids == ["one", "own", "own", "two"]
    assert list(tmp_path.glob("*.jsonl")) == []


async def test_events_stay_while_the_store_is_away(tmp_path: Path) -> None:
    pool = Pool()
    log = UsageLog(tmp_path, BASE, pool.put)
    pool.is_away = True
    log.record(context("one"))
    with pytest.raises(StoreUnavailable):
        await log.send_all()
    log.record(context("two"))
    pool.is_away = False
    await log.send_all()
    assert pool.ids == ["one", "two"]


async def test_a_full_disk_stops_no_answer_and_spoils_no_other_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool()
    log = UsageLog(tmp_path, BASE, pool.put)
    log.record(context("before"))
    write_all = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write_all(descriptor, data[:20]))
    log.record(context("torn"))
    monkeypatch.undo()
    log.record(context("after"))
    await log.send_all()
    assert pool.ids == ["after", "before"]


@pytest.mark.parametrize(("what", "num_files"), [("write", 1), ("rename", 0)])
async def test_a_full_disk_gets_no_more_files_and_leaves_none_open(
    what: str, num_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    log, num_open = UsageLog(tmp_path, BASE, Pool().put), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(*((os, "write") if what == "write" else (Path, "rename")), fail)
    for number in range(5):
        log.record(context(str(number)))
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == num_files
    log.close()
    assert len(os.listdir("/proc/self/fd")) == num_open


async def test_the_report_is_for_the_own_tenant_and_for_an_admin_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = write(
        tmp_path / "keys.json",
        entry("acme-key", roles=["infer"]),
        entry("globex-key", "globex", roles=["infer"]),
        entry("admin", "ops", roles=["admin"]),
    )
    async with asked(keys_file=keys, cache_dir=tmp_path) as (client, _):
        for key, times in (("acme-key", 2), ("globex-key", 1)):
            for _ in range(times):
                assert (await client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))).status_code == 200

        async def report(key: str, **query: Any) -> httpx.Response:
            return await client.get("/v1/usage", params=query, headers=bearer(key))

        def rows(answer: httpx.Response) -> dict[str, int]:
            assert answer.status_code == 200, answer.text
            return {row["tenant"]: row["requests"] for row in answer.json()["data"]}

        assert rows(await report("acme-key", by="tenant")) == {"acme": 2}
        assert rows(await report("admin", by="tenant")) == {"acme": 2, "globex": 1}
        assert rows(await report("admin", by="tenant", tenant="globex")) == {"globex": 1}
        assert (await report("acme-key", by="tenant", tenant="globex")).status_code == 403
        told = [(await report(key)).json() for key in ("acme-key", "admin")]
        assert [(each["tenant"], each["usage_days"]) for each in told] == [("acme", 400), (None, 400)]
        [row] = (await report("admin", by=["key", "day"], tenant="acme")).json()["data"]
        assert row["key"] == "id-acme-key" and row["last_at"][:10] == row["day"]
        assert (await report("admin", start="2026-01-02", end="2026-01-01")).status_code == 400
        assert (await report("admin", start="0001-01-01")).status_code == 400
        assert (await report("admin", by="prompt")).status_code == 400
        monkeypatch.setattr(usage, "MAX_ROWS", 1)
        monkeypatch.setattr(status, "MAX_ROWS", 1)
        assert "more than 1 rows" in (await report("admin", by="tenant")).text


@dataclass
class BusyStore(FakeStore):
    """Holds every report until `is_open` is set. `is_other`: set once globex reads one."""

    reading: list[str | None] = field(default_factory=list)
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    is_other: asyncio.Event = field(default_factory=asyncio.Event)

    async def usage(self, query: UsageQuery) -> list[JsonObject]:
        self.reading.append(query.tenant)
        if query.tenant == "globex":
            self.is_other.set()
        await self.is_open.wait()
        return []


async def test_reports_of_one_tenant_take_one_place_of_the_store(tmp_path: Path) -> None:
    roles = ["infer"]
    keys = write(tmp_path / "keys.json", entry("a", roles=roles), entry("g", "globex", roles=roles))
    store = BusyStore()
    async with asked(keys_file=keys, cache_dir=tmp_path, store=store) as (client, _):
        reports = [asyncio.create_task(client.get("/v1/usage", headers=bearer(key))) for key in "a" * 20 + "g"]
        await asyncio.wait_for(store.is_other.wait(), 60)
        assert sorted(map(str, store.reading)) == ["acme", "globex"]
        store.is_open.set()
        assert {answer.status_code for answer in await asyncio.gather(*reports)} == {200}
        assert len(store.reading) == 21


async def test_no_event_is_written_with_usage_days_0(tmp_path: Path) -> None:
    async with asked(cache_dir=tmp_path, usage_days=0) as (client, _):
        await client.post("/v1/chat/completions", json=CHAT)
        report = (await client.get("/v1/usage")).json()
        assert (report["data"], report["usage_days"]) == ([], 0)
    assert list(tmp_path.rglob("*.jsonl")) == []


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_stream_whose_client_leaves_is_recorded_with_499(is_cancelled: bool, tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        find_context(scope).caller = LOCAL_CALLER
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: {}", "more_body": True})
        if is_cancelled:
            raise asyncio.CancelledError

    assert await _read_statuses(app, UsageLog(tmp_path, BASE, Pool().put)) == ["499"]
    [event] = events_in(tmp_path)
    assert (event["status"], event["code"]) == (499, "")


@pytest.mark.parametrize("has_folder", [True, False])
async def test_a_client_that_leaves_after_the_last_text_of_its_stream_has_its_answer(
    has_folder: bool, tmp_path: Path
) -> None:
    log = UsageLog(tmp_path if has_folder else None, BASE, Pool().put)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        find_context(scope).caller = LOCAL_CALLER
        await send({"type": "http.response.start", "status": 200, "headers": []})
        log.record(find_context(scope), 200)  # as the end of every stream does

    assert await _read_statuses(app, log) == ["200"]
    assert [event["status"] for event in events_in(tmp_path)] == [200] * has_folder


async def _read_statuses(app: ASGIApp, log: UsageLog) -> list[str]:
    """Send a request to this application. Return the statuses that the metrics counted."""
    metrics = FakeMetrics()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    with suppress(asyncio.CancelledError):
        middleware = RequestContextMiddleware(app, Authenticator(None, 1), RequestMetrics(metrics), log)
        await middleware(scope, asyncio.Event().wait, _drop)
    return [status for _, status, _ in metrics["requests_total"].counts]


async def _drop(message: Any) -> None:
    """Take a message of an answer."""
