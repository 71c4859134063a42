from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.api.adapters import PublishItem
from deployments.http.bodies import DEFAULT_MAX_BODY_BYTES
from deployments.http.readiness import MAX_WAITING
from gpu_worker.errors import EngineFull, EngineStopped
from lora_store import Staged, VersionConflict
from retriever_svc import NoAdapterMatched
from tests.deployments.adapter_records import BASE, adapter, key_of
from tests.deployments.app_fakes import Served, http_of, serve_plainly
from tests.deployments.asking import ask, error_of, get, post, request
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import DELTAS, FakeWorker
from tests.deployments.key_files import entry, write

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BROKEN = (DELTAS[0], EngineStopped("it stopped"))


def test_http_answers_as_the_plain_method() -> None:
    response = post("/v1/chat/completions", CHAT)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "Hello"
    text = post("/v1/completions", {"prompt": "Once"})
    assert text.json()["choices"][0]["text"] == "Hello"


def test_http_streams_events() -> None:
    response = post("/v1/chat/completions", CHAT | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    *events, done = response.text.rstrip("\n").split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "Hello"


def test_an_error_before_the_first_token_is_a_status_over_http() -> None:
    response = post("/v1/chat/completions", CHAT | {"stream": True}, worker=FakeWorker([EngineFull("full")]))
    assert response.status_code == 503
    assert error_of(response)["code"] == "engine_full"
    assert response.headers["retry-after"] == "1"


def test_an_error_after_the_first_token_is_the_last_event_over_http() -> None:
    response = post("/v1/chat/completions", CHAT | {"stream": True}, worker=FakeWorker(BROKEN))
    assert response.status_code == 200
    last = response.text.rstrip("\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
    assert "[DONE]" not in response.text


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/chat/completions", CHAT | {"model": "nobody"}, 404, "model_not_found", "model"),
        ("/v1/chat/completions", CHAT | {"temperature": 9}, 400, "invalid_request", "temperature"),
        ("/v1/chat/completions", CHAT | {"lora": {"kk": 1}}, 400, "invalid_request", "lora.kk"),
        ("/v1/chat/completions", CHAT | {"min_tokens": 2, "max_tokens": 1}, 400, "invalid_request", "min_tokens"),
        (
            "/v1/chat/completions",
            CHAT | {"model": "poet", "lora": {"adapters": [{"name": "poet"}]}},
            400,
            "invalid_request",
            "lora.adapters",
        ),
        ("/v1/completions", {}, 400, "invalid_request", "prompt"),
        ("/v1/route", {"prompt": []}, 400, "invalid_request", "prompt"),
        ("/v1/nowhere", {}, 404, "http_error", None),
    ],
)
def test_a_refused_request_leaves_in_the_openai_shape(
    path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    response = post(path, body)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    if param is not None:
        assert error["param"] == param


def test_a_body_that_is_no_json_is_a_bad_request() -> None:
    headers = {"content-type": "application/json"}
    response = request("POST", "/v1/completions", sent={"content": b"{", "headers": headers})
    assert (response.status_code, error_of(response)["param"]) == (400, None)
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        rb'{"prompt": "\ud800"}',
        rb'{"prompt": "x", "model": "\ud800"}',
        rb'{"prompt": "x", "lora": {"adapters": [{"name": "\ud800"}]}}',
        rb'{"prompt": "x", "logit_bias": {"\ud800": 1}}',
    ],
)
def test_half_of_a_surrogate_pair_is_a_bad_request(body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = request("POST", "/v1/completions", sent={"content": body, "headers": headers})
    assert response.status_code in (400, 404)
    assert error_of(response)["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_413_over_http(announced: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * (DEFAULT_MAX_BODY_BYTES // 4)

    headers = {"content-type": "application/json"}
    content = b" " * (DEFAULT_MAX_BODY_BYTES + 1) if announced else chunks()
    response = request("POST", "/v1/chat/completions", sent={"content": content, "headers": headers})
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


def test_an_expected_error_is_an_answer_and_no_crash_of_the_replica() -> None:
    async def run() -> None:
        served = serve_plainly(retriever=FakeRetriever(failure=NoAdapterMatched(0.1, 0.5)))
        async with http_of(served, raise_app_exceptions=True) as client:
            response = await client.post("/v1/chat/completions", json=CHAT)
            assert (response.status_code, error_of(response)["code"]) == (422, "no_adapter_matched")
            response = await client.post("/v1/chat/completions", json=CHAT | {"model": "nobody"})
            assert response.status_code == 404

    asyncio.run(run())


def test_an_unforeseen_error_is_a_500_that_says_nothing() -> None:
    response = post("/v1/chat/completions", CHAT, worker=FakeWorker([RuntimeError("secret")]))
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text


def test_route_tells_the_plan_of_each_prompt_and_generates_nothing() -> None:
    async def run() -> None:
        served = serve_plainly()
        async with http_of(served) as client:
            answer = (await client.post("/v1/route", json={"prompt": ["a", "b"], "lora": {"k": 2}})).json()
        [(requests,)] = served.retriever.called("route")  # one call, however many prompts
        assert [(request.text, request.top_k) for request in requests] == [("a", 2), ("b", 2)]
        assert [[c["name"] for c in plan["candidates"]] for plan in answer["data"]] == [["poet", "coder"]] * 2
        assert served.worker.called("stream") == []

    asyncio.run(run())


def test_models_are_listed_and_shown() -> None:
    listed = get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["auto", BASE, "coder", "poet"]
    assert get("/v1/models/poet").json()["id"] == "poet"
    assert get("/v1/models/auto").json()["id"] == "auto"
    missing = get("/v1/models/nobody")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


class SlowStore(FakeStore):
    """Stages nothing until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def stage(self, upload: PublishItem, module_shapes: object) -> Staged:
        await self.gate.wait()
        return await super().stage(upload, module_shapes)


def test_health_is_told_while_ready_waits_for_the_preload(tmp_path: Path) -> None:
    async def run() -> None:
        store = SlowStore()
        served = serve_plainly(store=store, preload=preload_of(tmp_path, "poet"))
        async with http_of(served) as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            waiting = await client.get("/ready")
            assert (waiting.status_code, error_of(waiting)["code"]) == (503, "not_ready")
            store.gate.set()
            await served.services.preload.wait()
            assert (await client.get("/ready")).status_code == 200

    asyncio.run(run())


class Silent(FakeWorker):
    """Never answers."""

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        await asyncio.Event().wait()
        raise AssertionError


def test_ready_does_not_wait_for_ever() -> None:
    async def run(client: httpx.AsyncClient, served: Served) -> httpx.Response:
        served.services.readiness._wait_s = 0.01
        return await client.get("/ready")

    response = ask(run, worker=Silent())
    assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
    assert "did not answer" in error_of(response)["message"]


def test_ready_asks_once_in_half_a_second_however_many_ask_it() -> None:
    async def run(client: httpx.AsyncClient, served: Served) -> None:
        now_s = 100.0
        served.services.readiness._clock = lambda: now_s
        for step_s, num_asked in ((0.0, 1), (0.4, 1), (0.2, 2)):
            now_s += step_s
            answers = await asyncio.gather(*[client.get("/ready") for _ in range(20)])
            assert {answer.status_code for answer in answers} == {200}
            assert len(served.retriever.called("load")) == len(served.worker.called("module_shapes")) == num_asked

    ask(run)


def test_a_bounded_number_waits_for_ready() -> None:
    async def run(client: httpx.AsyncClient, served: Served) -> None:
        waiting = [asyncio.create_task(client.get("/ready")) for _ in range(MAX_WAITING)]
        while served.services.readiness._num_waiting < MAX_WAITING:
            await asyncio.sleep(0)
        response = await client.get("/ready")
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
        assert "256 clients" in error_of(response)["message"]
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert served.services.readiness._num_waiting == 0

    ask(run, worker=Silent())


def preload_of(folder: Path, *names: str) -> tuple[Path, ...]:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").touch()
    return (folder,)


def test_ready_tells_what_of_the_preload_was_refused(tmp_path: Path) -> None:
    response = get("/ready", preload=preload_of(tmp_path, "poet", "bad"))
    assert response.status_code == 200
    ready = response.json()
    assert (ready["status"], ready["generation"], ready["num_adapters"]) == ("ready", 7, 2)
    assert ready["refused"] == {"bad": "adapter 'bad' refused: it is bad"}
    assert str(tmp_path) not in response.text


def test_the_operator_is_told_where_what_was_refused_is(tmp_path: Path) -> None:
    async def started(_: httpx.AsyncClient, served: Served) -> Any:
        return await served.ingress.started()

    found = ask(started, preload=preload_of(tmp_path, "poet", "bad"))
    assert found["refused"] == {str(tmp_path / "bad"): "adapter 'bad' refused: it is bad"}


def test_a_preload_that_fails_as_a_whole_is_tried_again_when_ready_is_asked(tmp_path: Path) -> None:
    async def ready(client: httpx.AsyncClient, served: Served) -> list[int]:
        statuses = []
        for _ in range(2):
            statuses.append((await client.get("/ready")).status_code)
            await served.services.preload.wait()
        return statuses

    store = FakeStore(failing={"commit": (VersionConflict(3), 1)})
    assert ask(ready, store=store, preload=preload_of(tmp_path, "poet")) == [503, 200]
    assert list(store.live) == [("local", "poet")]


def test_the_preload_is_published_in_batches_of_one_commit_each(tmp_path: Path) -> None:
    async def run() -> Served:
        served = serve_plainly(preload=preload_of(tmp_path, *[f"a{number:02}" for number in range(33)]))
        await served.services.preload.wait()
        return served

    served = asyncio.run(run())
    commits = served.store.called("commit")
    assert [len(staged) for staged, *_ in commits] == [32, 1]
    assert {actor for _, _, _, actor, *_ in commits} == {"preload"}


def approved_at_start(served: Served) -> list[tuple[str, str]]:
    """(name, actor) of what was approved."""
    return [(ref.name, actor) for refs, actor in served.store.called("approve") for ref in refs]


@pytest.mark.parametrize(
    ("settings", "is_approved"),
    [
        ({}, False),
        ({"public_requires_approval": True}, True),
        ({"keys_file": "keys.json"}, True),
        ({"keys_file": "keys.json", "public_requires_approval": False}, True),
    ],
    ids=["no keys", "asked for", "keys", "keys, not asked for"],
)
def test_what_the_operator_preloads_is_approved_where_there_are_other_tenants(
    tmp_path: Path, settings: dict[str, Any], is_approved: bool
) -> None:
    if "keys_file" in settings:
        settings = settings | {"keys_file": write(tmp_path / "keys.json", entry("k"))}

    async def run() -> Served:
        served = serve_plainly(preload=preload_of(tmp_path, "a", "b"), **settings)
        await served.services.preload.wait()
        return served

    assert approved_at_start(asyncio.run(run())) == ([("a", "preload"), ("b", "preload")] if is_approved else [])


def test_what_was_preloaded_before_approval_was_asked_for_is_approved_at_the_next_start(tmp_path: Path) -> None:
    folders = preload_of(tmp_path, "a", "b", "c")
    store = FakeStore()
    refs = {}
    for name, actor in (("a", "preload"), ("b", "id-acme"), ("c", "preload")):
        record = replace(adapter(name, tenant="local"), actor=actor, approved=name == "c")
        store.live[key_of(record)], refs[name] = (record,), record.ref

    async def run() -> Served:
        served = serve_plainly(store=store, preload=folders, public_requires_approval=True)
        await served.services.preload.wait()
        return served

    assert approved_at_start(asyncio.run(run())) == [("a", "preload")]


def test_the_api_describes_itself() -> None:
    paths = get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/loras", "/v1/load_lora_adapter", "/v1/pool/verify"} <= paths.keys()
    assert set(paths["/v1/loras"]["post"]["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
