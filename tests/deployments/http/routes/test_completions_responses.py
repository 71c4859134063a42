"""`/v1/responses` over HTTP."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from deployments.api.structured import MAX_SCHEMA_DEPTH
from gpu_worker.front.request.request import Delta, TokenLogprob
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.asking import asked, error_of, post, request
from tests.deployments.fake_worker import BROKEN, FakeWorker

PATH = "/v1/responses"


def events_of(text: str) -> list[tuple[str, Any]]:
    events = []
    for event in text.rstrip("\n").split("\n\n"):
        name, data = event.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def test_a_response_names_the_adapters_in_its_body_and_headers() -> None:
    response = post(PATH, {"input": "Hi", "lora": {"adapters": [{"name": "poet"}]}})
    assert response.status_code == 200
    answer = response.json()
    assert answer["output"][0]["content"][0]["text"] == "Hello"
    assert answer["lora"]["adapters"][0]["name"] == "poet"
    assert response.headers["x-lora-adapters"].startswith("poet@")


async def test_it_generates_by_the_job_of_the_same_chat() -> None:
    jobs = []
    for path, body in (
        (PATH, {"input": "Hi", "instructions": "Be brief", "max_output_tokens": 4}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
                "max_tokens": 4,
            },
        ),
    ):
        served = serve_plainly()
        async with http_of(served, headers={"x-request-id": "r"}) as client:
            assert (await client.post(path, json=body)).status_code == 200
        jobs.append(served.job)
    [one, other] = [(job.prompt, job.plan, job.sampling, job.template) for job in jobs]
    assert one == other


def test_a_stream_names_its_events_and_ends_with_the_last_of_them() -> None:
    response = post(PATH, {"input": "Hi", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert all(name == data["type"] for name, data in events)
    assert events[0][0] == "response.created" and events[-1][0] == "response.completed"
    assert events[-1][1]["response"]["usage"]["output_tokens"] == 3


def test_an_error_after_the_first_token_ends_the_stream_as_a_failure() -> None:
    events = events_of(post(PATH, {"input": "Hi", "stream": True}, worker=FakeWorker(BROKEN)).text)
    assert [name for name, _ in events[-2:]] == ["response.failed", "error"]
    assert events[-1][1]["error"]["code"] == "unavailable"


def test_a_long_stream_ends_with_the_response_that_a_request_without_stream_gets() -> None:
    entry = TokenLogprob("\u2028".encode(), -1.0, ((b"b", -2.0),), 0)
    deltas = [Delta("\u2028" * 200, 5, 200 * place, logprobs=(entry,) * 200) for place in (1, 2)]
    body = {"input": "Hi", "top_logprobs": 1}
    answers = [
        post(PATH, body | more, worker=FakeWorker([*deltas, Delta("", 5, 401, "length")]))
        for more in ({}, {"stream": True})
    ]
    events = events_of(answers[1].text)
    assert [name for name, data in events if name != data["type"]] == []
    whole, last = answers[0].json(), events[-1][1]["response"]
    assert whole["output"][0]["content"] == last["output"][0]["content"]
    assert len(whole["output"][0]["content"][0]["logprobs"]) == 400


def test_refusals_name_the_field_of_this_api() -> None:
    stored = error_of(post(PATH, {"input": "Hi", "previous_response_id": "resp_1"}))
    assert (stored["code"], stored["param"]) == ("previous_response_not_found", "previous_response_id")
    assert "send the whole conversation in input" in stored["message"]
    strict = error_of(post(PATH, {"input": "Hi", "verbosity": "low"}, strict_fields=True))
    assert strict["param"] == "verbosity"


@pytest.mark.parametrize("value", ["\ud800", math.nan, math.inf])
def test_a_schema_that_the_answer_could_not_repeat_is_refused(value: Any) -> None:
    """The response repeats tools and formats, as JSON in UTF-8."""
    schema = {"type": "object", "properties": {"a": {"enum": [value]}}}
    sent: dict[str, dict[str, Any]] = {
        "tools.0.parameters": {"tools": [{"type": "function", "name": "f", "parameters": schema}]},
        "text.format.schema": {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
    }
    for param, body in sent.items():
        given = {"content": json.dumps({"input": "Hi", **body}), "headers": {"content-type": "application/json"}}
        response = request("POST", PATH, sent=given)
        assert (response.status_code, error_of(response)["param"]) == (400, param)
        assert "lone surrogates" in error_of(response)["message"]


SCHEMA_IN: dict[str, dict[str, Any]] = {
    "tools.0.parameters": {"tools": [{"type": "function", "name": "f", "parameters": "HERE"}]},
    "text.format.schema": {"text": {"format": {"type": "json_schema", "name": "x", "schema": "HERE"}}},
}


@pytest.mark.parametrize("param", SCHEMA_IN)
@pytest.mark.parametrize(
    "more", [{}, {"stream": True}, {"top_logprobs": 1}, {"top_logprobs": 1, "stream": True}], ids=str
)
async def test_a_deep_schema_is_repeated_or_refused_by_its_field(param: str, more: dict[str, Any]) -> None:
    """The deepest are near the interpreter's bound on recursion, which the answer may reach before the body does."""
    statuses = []
    async with asked(headers={"content-type": "application/json"}) as (client, _):
        for depth in (MAX_SCHEMA_DEPTH - 1, MAX_SCHEMA_DEPTH, 400, 800, *range(900, 1000, 4)):
            schema = '{"items": ' * depth + "{}" + "}" * depth
            body = json.dumps({"input": "Hi", **SCHEMA_IN[param], **more}).replace('"HERE"', schema)
            response = await client.post(PATH, content=body)
            statuses.append(response.status_code)
            if depth < MAX_SCHEMA_DEPTH:
                assert '"items"' in response.text and '"error":{' not in response.text.replace(" ", "")
            else:
                assert "nested too deeply" in error_of(response)["message"], depth
                assert error_of(response)["param"] == param or depth > 900, "then the body itself is too deep"
    assert statuses == [200] + [400] * (len(statuses) - 1)


def test_whole_surrogate_pairs_are_repeated() -> None:
    schema = {"type": "object", "title": "\U0001f600 \\ud800"}
    tools = [{"type": "function", "name": "f", "parameters": schema}]
    assert post(PATH, {"input": "Hi", "tools": tools}).json()["tools"][0]["parameters"] == schema


def test_ignored_fields_are_listed() -> None:
    response = post(PATH, {"input": "Hi", "reasoning": {"effort": "low"}, "text": {"verbosity": "low"}})
    assert set(response.headers["x-ignored-fields"].split(", ")) == {"reasoning", "text.verbosity"}
