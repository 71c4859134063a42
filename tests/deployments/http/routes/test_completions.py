from __future__ import annotations

import asyncio
import json

from gpu_worker.errors import EngineFull
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import error_of, post
from tests.deployments.fake_worker import BROKEN, FakeWorker

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def test_http_answers_like_the_plain_method() -> None:
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


def test_route_returns_the_plan_of_each_prompt_without_generating() -> None:
    async def run() -> None:
        served = serve_plainly()
        async with http_of(served) as client:
            answer = (await client.post("/v1/route", json={"prompt": ["a", "b"], "lora": {"k": 2}})).json()
        [(requests,)] = served.retriever.called("route")  # one call for any number of prompts
        assert [(request.text, request.top_k) for request in requests] == [("a", 2), ("b", 2)]
        assert [[c["name"] for c in plan["candidates"]] for plan in answer["data"]] == [["poet", "coder"]] * 2
        assert served.worker.called("stream") == []

    asyncio.run(run())
