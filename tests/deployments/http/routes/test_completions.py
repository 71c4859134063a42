from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from deployments.api import completion_responses
from deployments.api.logprobs import text_logprobs
from gpu_worker.config import NativeSettings
from gpu_worker.front.request.request import Delta, PromptToken, TokenIds
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import chunks_of, error_of, post
from tests.deployments.fake_worker import BROKEN, FakeWorker

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def test_http_streams_events() -> None:
    response = post("/v1/chat/completions", CHAT | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks_of(response)) == "Hello"


def test_an_error_after_the_first_token_is_the_last_event_over_http() -> None:
    response = post("/v1/chat/completions", CHAT | {"stream": True}, worker=FakeWorker(BROKEN))
    assert response.status_code == 200
    *_, before, last = response.text.rstrip("\n").split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["message"], '"Hel"' in before) == ("unavailable", "it stopped", True)
    assert "[DONE]" not in response.text


async def test_route_returns_the_plan_of_each_prompt_without_generating() -> None:
    served = serve_plainly()
    async with http_of(served) as client:
        answer = (await client.post("/v1/route", json={"prompt": ["a", "b"], "lora": {"k": 2}})).json()
    [(requests,)] = served.retriever.called("route")  # one call for any number of prompts
    assert [(request.text, request.top_k) for request in requests] == [("a", 2), ("b", 2)]
    assert [[c["name"] for c in plan["candidates"]] for plan in answer["data"]] == [["poet", "coder"]] * 2
    assert served.worker.called("stream") == []


async def test_token_ids_are_sent_as_they_are_and_find_adapters_by_their_text() -> None:
    served = serve_plainly()
    async with http_of(served) as client:
        answer = await client.post("/v1/completions", json={"prompt": [[72, 105], [79, 104]], "n": 2})
    assert answer.status_code == 200, answer.text
    jobs = [job for (job,) in served.worker.called("stream")]
    assert [job.prompt for job in jobs] == [TokenIds((72, 105))] * 2 + [TokenIds((79, 104))] * 2
    [(requests,)] = served.retriever.called("route")
    assert [request.text for request in requests] == ["Hi", "Oh"]
    assert answer.json()["usage"]["prompt_tokens"] == 10, "as the worker counts them"


async def test_ids_are_decoded_only_where_their_text_is_needed() -> None:
    async def decoded(body: dict[str, object]) -> int:
        served = serve_plainly()
        async with http_of(served) as client:
            assert (await client.post("/v1/completions", json={"prompt": [72, 105], **body})).status_code == 200
        return len(served.worker.called("detokenize"))

    assert await decoded({"model": "poet"}) == 0
    assert await decoded({"model": "poet", "echo": True}) == 1
    assert await decoded({"model": "auto"}) == 1
    assert await decoded({"lora": {"query": "other text"}}) == 0


@pytest.mark.parametrize("prompt", ["Hi", [72, 105]], ids=["text", "ids"])
def test_echo_puts_the_prompt_before_the_answer_whole_and_in_a_stream(prompt: object) -> None:
    body = {"prompt": prompt, "echo": True}
    assert post("/v1/completions", body).json()["choices"][0]["text"] == "HiHello"
    chunks = chunks_of(post("/v1/completions", body | {"stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "HiHello"


def test_log_probabilities_of_an_echoed_prompt_are_listed_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop: list[bool] = []

    def listed(*args: Any) -> Any:
        in_loop.append(threading.current_thread() is threading.main_thread())
        return text_logprobs(*args)

    monkeypatch.setattr(completion_responses, "text_logprobs", listed)
    worker = FakeWorker([Delta("Hel", 2, 1, prompt=(PromptToken(72, b"Hi", 0),)), Delta("lo", 2, 2, "stop")])
    body = {"prompt": "Hi", "echo": True, "logprobs": 1}
    chunks = chunks_of(post("/v1/completions", body | {"stream": True}, worker=worker))
    assert [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]] == [
        "Hi"
    ]
    post("/v1/completions", body, worker=worker)
    assert in_loop == [False, False]


@pytest.mark.parametrize(
    ("ids", "code", "param"),
    [
        ([2**31], "invalid_request", "prompt.0.0"),
        ([-1], "invalid_request", "prompt.0.0"),
        ([1, "a"], "invalid_request", "prompt.0.1"),
        ([[1], []], "invalid_request", "prompt.1"),
        ([1] * 10, "context_length_exceeded", None),
    ],
    ids=str,
)
def test_token_ids_that_are_no_prompt_are_refused_before_any_call(ids: object, code: str, param: str | None) -> None:
    response = post("/v1/completions", {"prompt": ids}, engine=NativeSettings(max_model_len=10))
    assert response.status_code == 400
    assert (error_of(response)["code"], error_of(response)["param"]) == (code, param)
