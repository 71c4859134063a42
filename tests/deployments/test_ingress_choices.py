"""Several answers to one request: `n`, and completions of several prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from threading import get_ident
from typing import Any

import pytest

from gpu_worker.front.request.request import Delta, Job, TokenLogprob
from tests.deployments.adapter_records import BASE
from tests.deployments.asking import asked, chunks_of, error_of, post
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


async def test_n_choices_of_one_plan_are_in_order_with_separate_seeds_whole_and_streamed() -> None:
    body = CHAT | {"n": 3, "seed": 5}
    async with asked(worker=Echo()) as (client, served):
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        assert len(served.retriever.called("route")) == 1
        assert len({job.plan for (job,) in served.worker.called("stream")}) == 1
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = await client.post("/v1/chat/completions", json=body | streaming)
    whole = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert whole[0] == "Hi/5" and len(set(whole)) == 3
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8} | NOTHING_CACHED
    opening, *parts, usage = chunks_of(streamed)
    assert [choice["index"] for choice in opening["choices"]] == [0, 1, 2]
    assert {choice["delta"]["role"] for choice in opening["choices"]} == {"assistant"}
    choices = [choice for part in parts for choice in part["choices"]]
    assert len(choices) == len(parts), "one choice in each event"
    texts = ["".join(c["delta"]["content"] for c in choices if c["index"] == index) for index in range(3)]
    assert (texts, usage["usage"]) == (whole, answer["usage"])
    assert sorted(choice["index"] for choice in choices if choice["finish_reason"]) == [0, 1, 2]


async def test_prompts_have_separate_plans_and_choices() -> None:
    body = {"prompt": ["a", "bb"], "n": 2, "seed": 0}
    async with asked(worker=Echo()) as (client, served):
        answer = (await client.post("/v1/completions", json=body)).json()
        assert [request.text for (requests,) in served.retriever.called("route") for request in requests] == ["a", "bb"]
    assert [choice["text"].partition("/")[0] for choice in answer["choices"]] == ["a", "a", "bb", "bb"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["lora"]["strategy"] == "mixture" for choice in answer["choices"])
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11} | NOTHING_CACHED


def test_prompts_are_streamed_with_their_plans_and_a_list_of_one_is_that_prompt() -> None:
    opening, *parts = chunks_of(post("/v1/completions", {"prompt": ["a", "b"], "stream": True}, worker=Echo()))
    assert [choice["lora"]["strategy"] for choice in opening["choices"]] == ["mixture", "mixture"]
    choices = [choice for part in parts for choice in part["choices"]]
    assert ["".join(c["text"] for c in choices if c["index"] == index) for index in (0, 1)] == ["a/None", "b/None"]
    one, listed = (post("/v1/completions", {"prompt": p}, worker=Echo()).json() for p in ("a", ["a"]))
    assert [one["choices"], one["lora"]] == [listed["choices"], listed["lora"]]


def test_log_probabilities_of_all_choices_are_counted_while_they_arrive() -> None:
    half = Delta("a", 5, 2**16, logprobs=(TokenLogprob(b"a", -1.0, ((b"a", -1.0),), 0),) * 2**16)
    worker = FakeWorker([half, replace(half, logprobs=half.logprobs[:1], finish_reason="length")])
    answer = post("/v1/chat/completions", CHAT | {"n": 2, "logprobs": True, "top_logprobs": 1}, worker=worker)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "top_logprobs")


def test_answers_with_log_probabilities_are_built_outside_the_event_loop() -> None:
    threads: set[int] = set()

    class Watched(tuple[tuple[bytes, float], ...]):
        def __iter__(self) -> Iterator[tuple[bytes, float]]:
            threads.add(get_ident())
            return super().__iter__()

    entries = [TokenLogprob(f"{number}".encode(), -1.0, Watched([(b"b", -2.0)]), 0) for number in range(300)]
    scored = Delta("a", 5, 300, "stop", logprobs=tuple(entries))
    answer = post("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 1}, worker=FakeWorker([scored]))
    content = answer.json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == [f"{number}" for number in range(300)]
    assert [alternative["token"] for token in content for alternative in token["top_logprobs"]] == ["b"] * 300
    assert threads and get_ident() not in threads


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["a"] * 65, "n": 2}, "n"),
        ("/v1/completions", {"prompt": ["a"] * 129}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt.0"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [""]}, "prompt.0"),
        ("/v1/completions", {"prompt": ["a", ""]}, "prompt.1"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}}, "stream_options"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_impossible_prompts_choices_and_options_are_refused_by_their_field(path: str, body: Any, param: str) -> None:
    response = post(path, body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_a_request_may_have_128_rows() -> None:
    assert post("/v1/completions", {"prompt": ["a"] * 64, "n": 2, "model": BASE}).status_code == 200


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
