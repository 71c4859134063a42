"""Several answers to one request: `n`, and completions of several prompts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gpu_worker.front.request.request import Delta, Job, TokenLogprob
from tests.deployments.adapter_records import BASE
from tests.deployments.app_fakes import Served
from tests.deployments.asking import ask, error_of, post
from tests.deployments.fake_worker import NOTHING_CACHED, FakeWorker

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


class Echo(FakeWorker):
    """Answers with the prompt and the seed, token by token, with log probabilities if requested."""

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        prompt = job.prompt if isinstance(job.prompt, str) else job.prompt[-1].content
        words = [prompt, f"/{job.sampling.seed}"]
        for number, word in enumerate(words, start=1):
            logprobs = () if job.sampling.logprobs is None else (TokenLogprob(word.encode(), -1.0, (), 0),)
            reason = "stop" if number == len(words) else None
            yield Delta(word, len(prompt), number, reason, logprobs=logprobs)


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    *events, done = response.text.rstrip("\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_n_choices_of_a_chat_are_in_order_with_separate_seeds() -> None:
    answer = post("/v1/chat/completions", CHAT | {"n": 3, "seed": 5}, worker=Echo()).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert texts[0] == "Hi/5"
    assert len(set(texts)) == 3
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8} | NOTHING_CACHED


def test_adapters_are_retrieved_once_for_n_choices() -> None:
    async def send(client: httpx.AsyncClient, served: Served) -> None:
        await client.post("/v1/chat/completions", json=CHAT | {"n": 3})
        assert len(served.retriever.called("route")) == 1
        assert len({job.plan for (job,) in served.worker.called("stream")}) == 1

    ask(send)


def test_n_choices_are_streamed_under_their_index() -> None:
    body = CHAT | {"n": 3, "seed": 5, "stream": True, "stream_options": {"include_usage": True}}
    opening, *parts, usage = chunks_of(post("/v1/chat/completions", body, worker=Echo()))
    assert [choice["index"] for choice in opening["choices"]] == [0, 1, 2]
    assert {choice["delta"]["role"] for choice in opening["choices"]} == {"assistant"}
    texts = {0: "", 1: "", 2: ""}
    for part in parts:
        [choice] = part["choices"]
        texts[choice["index"]] += choice["delta"]["content"]
    whole = post("/v1/chat/completions", CHAT | {"n": 3, "seed": 5}, worker=Echo()).json()
    assert list(texts.values()) == [choice["message"]["content"] for choice in whole["choices"]]
    assert usage["usage"] == whole["usage"]
    assert sorted(part["choices"][0]["index"] for part in parts if part["choices"][0]["finish_reason"]) == [0, 1, 2]


def test_prompts_have_separate_plans_and_choices() -> None:
    body = {"prompt": ["a", "bb"], "n": 2, "seed": 0}
    answer = post("/v1/completions", body, worker=Echo()).json()
    assert [choice["text"].partition("/")[0] for choice in answer["choices"]] == ["a", "a", "bb", "bb"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["lora"]["strategy"] == "mixture" for choice in answer["choices"])
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11} | NOTHING_CACHED

    async def texts(client: httpx.AsyncClient, served: Served) -> list[str]:
        await client.post("/v1/completions", json=body)
        return [request.text for (requests,) in served.retriever.called("route") for request in requests]

    assert ask(texts) == ["a", "bb"]


def test_prompts_are_streamed_with_the_plan_of_each() -> None:
    opening, *parts = chunks_of(post("/v1/completions", {"prompt": ["a", "b"], "stream": True}, worker=Echo()))
    assert [choice["lora"]["strategy"] for choice in opening["choices"]] == ["mixture", "mixture"]
    texts = ["", ""]
    for part in parts:
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert texts == ["a/None", "b/None"]


def test_a_list_of_one_prompt_is_that_prompt() -> None:
    one, listed = (post("/v1/completions", {"prompt": p}, worker=Echo()).json() for p in ("a", ["a"]))
    assert [one["choices"], one["lora"]] == [listed["choices"], listed["lora"]]


def test_the_rows_of_one_request_are_limited() -> None:
    response = post("/v1/completions", {"prompt": ["a"] * 65, "n": 2})
    assert (response.status_code, error_of(response)["param"]) == (400, "n")
    assert post("/v1/completions", {"prompt": ["a"] * 64, "n": 2, "model": BASE}).status_code == 200
    response = post("/v1/completions", {"prompt": ["a"] * 129})
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", ""]])
def test_an_empty_prompt_is_refused_by_its_index(prompt: Any) -> None:
    response = post("/v1/completions", {"prompt": prompt})
    assert response.status_code == 400
    assert error_of(response)["param"].startswith("prompt")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_stream_options_require_a_stream(path: str) -> None:
    body = {"messages": CHAT["messages"]} if "chat" in path else {"prompt": "a"}
    response = post(path, body | {"stream_options": {"include_usage": True}})
    assert (response.status_code, error_of(response)["param"]) == (400, "stream_options")


def test_logprobs_are_included_only_on_request() -> None:
    asked = post("/v1/chat/completions", CHAT | {"n": 2, "logprobs": True}, worker=Echo()).json()
    assert [[t["token"] for t in c["logprobs"]["content"]] for c in asked["choices"]] == [["Hi", "/None"]] * 2
    plain = post("/v1/chat/completions", CHAT, worker=Echo()).json()
    assert plain["choices"][0]["logprobs"] is None
    text = post("/v1/completions", {"prompt": "a", "logprobs": 0}, worker=Echo()).json()
    assert text["choices"][0]["logprobs"]["tokens"] == ["a", "/None"]
    opening, *parts = chunks_of(post("/v1/chat/completions", CHAT | {"stream": True, "logprobs": True}, worker=Echo()))
    assert opening["choices"][0]["logprobs"] is None
    assert [part["choices"][0]["logprobs"]["content"][0]["token"] for part in parts] == ["Hi", "/None"]
