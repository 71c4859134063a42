from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.body_limit import DEFAULT_MAX_BODY_BYTES
from gpu_worker.errors import EngineFull, EngineStopped
from lora_store import VersionConflict
from retriever_svc import NoAdapterMatched, StaleIndex
from tests.deployments.app_fakes import (
    BASE,
    DELTAS,
    POOL,
    FakeRetriever,
    FakeStore,
    FakeWorker,
    Served,
    http_of,
    serve_plainly,
)

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BROKEN = (DELTAS[0], EngineStopped("it stopped"))


def http(ask: Callable[[httpx.AsyncClient], Awaitable[Any]], *, host: str = "127.0.0.1", **options: Any) -> Any:
    async def run() -> Any:
        served = serve_plainly(**options)
        await asyncio.wait([served.ingress._preload])
        async with http_of(served, host=host) as client:
            return await ask(client)

    return asyncio.run(run())


def post(path: str, body: Any, **options: Any) -> httpx.Response:
    response: httpx.Response = http(lambda client: client.post(path, json=body), **options)
    return response


def get(path: str, **options: Any) -> httpx.Response:
    response: httpx.Response = http(lambda client: client.get(path), **options)
    return response


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_http_answers_as_the_plain_method() -> None:
    response = post("/v1/chat/completions", CHAT)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "Hello"
    text = post("/v1/completions", {"prompt": "Once"})
    assert text.json()["choices"][0]["text"] == "Hello"


def test_http_streams_events() -> None:
    response = post("/v1/chat/completions", CHAT | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
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
        ("/v1/chat/completions", CHAT | {"temprature": 1}, 400, "invalid_request", "temprature"),
        ("/v1/chat/completions", CHAT | {"lora": {"kk": 1}}, 400, "invalid_request", "lora.kk"),
        ("/v1/chat/completions", CHAT | {"min_tokens": 2, "max_tokens": 1}, 400, "invalid_request", None),
        (
            "/v1/chat/completions",
            CHAT | {"model": "poet", "lora": {"adapters": [{"name": "poet"}]}},
            400,
            "invalid_request",
            "lora.adapters",
        ),
        ("/v1/completions", {}, 400, "invalid_request", "prompt"),
        ("/v1/route", {"prompt": []}, 400, "invalid_request", None),
        ("/v1/loras", {"path": "/folders/bad"}, 400, "adapter_refused", None),
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
    response = http(lambda client: client.post("/v1/completions", content=b"{", headers=headers))
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_413_over_http(announced: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * (DEFAULT_MAX_BODY_BYTES // 4)

    headers = {"content-type": "application/json"}
    content = b" " * (DEFAULT_MAX_BODY_BYTES + 1) if announced else chunks()
    response = http(lambda client: client.post("/v1/chat/completions", content=content, headers=headers))
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
        assert [request.text for (request,) in served.retriever.called("route")] == ["a", "b"]
        assert [request.top_k for (request,) in served.retriever.called("route")] == [2, 2]
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


def test_the_pool_is_listed_with_its_generation() -> None:
    listed = get("/v1/loras").json()
    assert listed["generation"] == 7
    assert [row["name"] for row in listed["data"]] == ["coder", "poet"]


def test_a_publish_is_201_and_carries_what_the_client_said() -> None:
    async def run() -> None:
        served = serve_plainly()
        body = {"path": "/folders/x", "name": "singer", "tags": ["fun"], "template": "chat"}
        async with http_of(served) as client:
            response = await client.post("/v1/loras", json=body)
        assert response.status_code == 201
        assert (response.json()["name"], response.json()["generation"]) == ("singer", 8)
        [(upload, _)] = served.store.called("stage")
        assert (upload.path, upload.name, upload.tags, upload.template) == (
            Path("/folders/x"),
            "singer",
            ("fun",),
            "chat",
        )
        assert served.store.called("commit")[0][-1] == "http"

    asyncio.run(run())


def test_a_publish_that_a_replica_has_not_seen_is_202() -> None:
    late = FakeRetriever(caught_up=StaleIndex(8, 7))
    response = post("/v1/loras", {"path": "/folders/singer"}, retriever=late)
    assert response.status_code == 202
    assert response.json()["replicas"] == {"ready": 0, "behind": 1}


@pytest.mark.parametrize("options", [{"host": "10.0.0.1"}, {"publish_paths": False}])
def test_folders_are_published_from_this_machine_and_where_allowed(options: dict[str, Any]) -> None:
    async def run() -> None:
        host = options.get("host", "127.0.0.1")
        served = serve_plainly(**{key: value for key, value in options.items() if key != "host"})
        async with http_of(served, host=host) as client:
            response = await client.post("/v1/loras", json={"path": "/folders/x"})
        assert (response.status_code, error_of(response)["code"]) == (403, "publishing_off")
        assert served.store.calls == []

    asyncio.run(run())


def test_health_is_told_while_ready_waits_for_the_preload() -> None:
    async def run() -> None:
        served = serve_plainly()
        async with http_of(served) as client:
            served.ingress._preload = asyncio.get_running_loop().create_future()
            assert (await client.get("/health")).json() == {"status": "ok"}
            waiting = await client.get("/ready")
            assert (waiting.status_code, error_of(waiting)["code"]) == (503, "not_ready")

    asyncio.run(run())


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
    assert ready["refused"] == {str(tmp_path / "bad"): "adapter 'bad' refused: it is bad"}


def test_a_preload_that_fails_as_a_whole_is_tried_again_when_ready_is_asked(tmp_path: Path) -> None:
    async def ready(client: httpx.AsyncClient) -> list[tuple[int, str | None]]:
        statuses: list[tuple[int, str | None]] = []
        while len(statuses) < 20 and (not statuses or statuses[-1][0] != 200):
            response = await client.get("/ready")
            statuses.append((response.status_code, response.json().get("error", {}).get("code")))
            for _ in range(50):  # the preload's own task gets its turns
                await asyncio.sleep(0)
        return statuses

    store = FakeStore(failure=VersionConflict(3), num_failures=1)
    statuses = http(ready, store=store, preload=preload_of(tmp_path, "poet"))
    assert statuses[0] == (503, "not_ready")
    assert statuses[-1] == (200, None)


def test_the_preload_is_published_in_batches_of_one_commit_each(tmp_path: Path) -> None:
    async def run() -> Served:
        served = serve_plainly(preload=preload_of(tmp_path, *[f"a{number:02}" for number in range(33)]))
        await served.ingress._preload
        return served

    served = asyncio.run(run())
    commits = served.store.called("commit")
    assert [len(staged) for staged, *_ in commits] == [32, 1]
    assert {actor for *_, actor in commits} == {"preload"}


def test_a_record_keeps_its_private_parts_out_of_the_list() -> None:
    shown = get("/v1/loras", retriever=FakeRetriever([replace(POOL[0], embedding=(0.123456, 0.5))])).text
    assert "0.123456" not in shown
