"""Responses and their events, built from the chunks of a chat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from deployments.api.completion_responses import Answer
from deployments.api.completions import MAX_ANSWER_LOGPROBS
from deployments.api.responses import Planned
from deployments.api.responses_answer import ResponseForm
from deployments.api.responses_request import LOGPROBS, ResponsesRequest
from deployments.json_types import JsonObject
from gpu_worker.front.request.request import Completion, Delta, TokenLogprob
from gpu_worker.front.request.tools import ToolCallPiece
from lora_store import BASE_PLAN
from tests.deployments.random_calls import random_calls

PLAN = Planned(BASE_PLAN)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
DEFAULTS = {"temperature": 0.5, "min_p": 0.1}
OPENED = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
CLOSED = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


def logprob(token: str) -> TokenLogprob:
    return TokenLogprob(token.encode(), -1.0, ((token.encode(), -1.0),), 0)


DELTAS = (
    Delta("Hel", 5, 1, logprobs=(logprob("Hel"),)),
    Delta("lo", 5, 2, logprobs=(logprob("lo"),)),
    Delta("", 5, 3, "stop"),
)


def answer_of(*, num_logprobs: int | None = None) -> Answer:
    return Answer("chat", "auto", [PLAN], num_logprobs=num_logprobs, request_id="r")


def form_of(**fields: Any) -> ResponseForm:
    request = ResponsesRequest.model_validate({"input": "Hi"} | fields)
    form = ResponseForm(request, "r")
    form.use(request, DEFAULTS)
    return form


def streamed(deltas: Sequence[Delta], form: ResponseForm, *, with_end: bool = True) -> list[JsonObject]:
    answer = answer_of(num_logprobs=2)

    async def chunks() -> AsyncGenerator[JsonObject]:
        yield answer.opening()
        for delta in deltas:
            yield answer.chunk(0, delta)
        if with_end:
            yield answer.usage_chunk([deltas[-1]])

    async def collect() -> list[JsonObject]:
        return [event async for event in form.events(chunks())]

    return asyncio.run(collect())


def whole(deltas: Sequence[Delta], form: ResponseForm) -> Any:
    answer: Any = answer_of(num_logprobs=2).whole([Completion.joined(deltas)])
    return form.whole(answer)


def test_events_come_in_the_order_of_the_openai_api_and_agree_with_each_other() -> None:
    events = streamed(DELTAS, form_of())
    deltas = ["response.output_text.delta"] * 2
    assert [event["type"] for event in events] == [*OPENED, *deltas, *CLOSED, "response.completed"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["delta"] for event in events if event["type"] == deltas[0]] == ["Hel", "lo"]
    for event in events:
        assert EVENT.validate_python(event).type == event["type"]
    by_type = {event["type"]: event for event in events}
    response = by_type["response.completed"]["response"]
    [item] = response["output"]
    assert item == by_type["response.output_item.done"]["item"]
    assert item["content"] == [by_type["response.content_part.done"]["part"]]
    assert item["content"][0]["text"] == by_type["response.output_text.done"]["text"] == "Hello"
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    added = by_type["response.output_item.added"]["item"]
    assert added == item | {"status": "in_progress", "content": []}
    assert by_type["response.content_part.added"]["part"]["text"] == ""
    begun = by_type["response.created"]["response"]
    assert (begun["status"], begun["output"], begun["usage"], begun["id"]) == ("in_progress", [], None, response["id"])


def test_a_response_repeats_the_request_and_has_nothing_stored() -> None:
    fields: dict[str, Any] = {
        "instructions": "Be brief",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "text": {"format": {"type": "json_object"}},
        "top_p": 0.9,
        "user": "u",
    }
    response = whole(DELTAS, form_of(**fields))
    assert {name: response[name] for name in fields} == fields
    assert (response["store"], response["previous_response_id"], response["background"]) == (False, None, False)
    assert response["id"] == "resp_r" and response["lora"]["strategy"] == "base"
    usage = Response.model_validate(response).usage
    assert usage is not None and (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (5, 3, 8)


def test_an_answer_cut_at_the_limit_is_incomplete() -> None:
    cut = (*DELTAS[:2], Delta("", 5, 3, "length"))
    [*_, last] = streamed(cut, form_of())
    assert last["type"] == "response.incomplete"
    for found in (last["response"], whole(cut, form_of())):
        assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert (found["output"][0]["status"], found["output"][0]["content"][0]["text"]) == ("incomplete", "Hello")


def test_only_the_last_item_of_a_cut_answer_is_incomplete() -> None:
    calls = [ToolCallPiece(place, "{", f"call_{place}", "f") for place in range(2)]
    cut = (
        Delta("Well", 5, 1),
        Delta("", 5, 2, tool_calls=(calls[0],)),
        Delta("", 5, 3, "length", tool_calls=(calls[1],)),
    )
    ended = [event["item"] for event in streamed(cut, form_of()) if event["type"] == "response.output_item.done"]
    for items in (ended, whole(cut, form_of())["output"]):
        assert [item["status"] for item in items] == ["completed", "completed", "incomplete"]


def test_an_empty_answer_is_an_empty_message() -> None:
    events = streamed([Delta("", 5, 1, "stop")], form_of())
    assert [event["type"] for event in events] == [*OPENED, *CLOSED, "response.completed"]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_a_broken_stream_ends_with_the_failed_response_and_an_error() -> None:
    form = form_of()
    events = streamed(DELTAS[:1], form, with_end=False)
    error = {"message": "it stopped", "type": "overloaded_error", "param": None, "code": "unavailable"}
    failed, last = form.failed(error)
    assert [failed["sequence_number"], last["sequence_number"]] == [len(events), len(events) + 1]
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "it stopped"}
    assert failed["response"]["output"][0]["content"][0]["text"] == "Hel"
    assert EVENT.validate_python(failed).type == "response.failed"
    assert (last["type"], last["message"], last["error"]) == ("error", "it stopped", error)


CALLS = (
    Delta("Wait", 5, 1),
    Delta("", 5, 2, tool_calls=(ToolCallPiece(0, '{"x"', "a", "f"),)),
    Delta("", 5, 3, tool_calls=(ToolCallPiece(0, ": 1}"), ToolCallPiece(1, "{}", "b", "g"))),
    Delta("", 5, 4, "tool_calls"),
)


def test_calls_are_items_after_the_message_with_events_of_their_own() -> None:
    events = streamed(CALLS, form_of())
    call = ["response.output_item.added", "response.function_call_arguments.delta"]
    done = ["response.function_call_arguments.done", "response.output_item.done"]
    text = [*OPENED, "response.output_text.delta", *CLOSED]
    assert [event["type"] for event in events] == [*text, *call, call[1], *done, *call, *done, "response.completed"]
    for event in events:
        assert EVENT.validate_python(event).type == event["type"]
    items = events[-1]["response"]["output"]
    assert [(item["type"], item.get("call_id"), item.get("name"), item.get("arguments")) for item in items] == [
        ("message", None, None, None),
        ("function_call", "a", "f", '{"x": 1}'),
        ("function_call", "b", "g", "{}"),
    ]
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2]
    assert len({item["id"] for item in items}) == 3
    assert {item["status"] for item in items} == {"completed"}


@pytest.mark.parametrize(
    ("deltas", "fields", "tokens"),
    [
        (DELTAS, {"metadata": {"a": "b"}, "user": "u", "instructions": "Be brief"}, ["Hel", "lo"]),
        ((*DELTAS[:2], Delta("", 5, 4, "length", logprobs=(logprob("\ufffd"),))), {}, ["Hel", "lo", "\ufffd"]),
        (CALLS, {}, []),
        (CALLS[1:], {}, []),
    ],
    ids=["text", "a token without a text of its own", "text and calls", "calls alone"],
)
def test_the_last_event_has_the_response_that_a_request_without_stream_gets(
    deltas: Sequence[Delta], fields: dict[str, Any], tokens: list[str]
) -> None:
    fields = fields | {"include": [LOGPROBS]}
    [*_, last] = streamed(deltas, form_of(**fields))
    found = whole(deltas, form_of(**fields))
    assert last["response"] | {"created_at": 0} == found | {"created_at": 0}
    assert read_parts(found)[3] == tokens


@pytest.mark.parametrize("num_more", [0, 1], ids=["at the bound", "above it"])
def test_log_probabilities_above_the_bound_of_a_whole_answer_are_only_in_deltas(num_more: int) -> None:
    """They are in two messages with a call between them. Each token has one alternative, so that it counts twice."""
    num_tokens = MAX_ANSWER_LOGPROBS // 4
    half = Delta("a", 5, 1, logprobs=(logprob("a"),) * num_tokens)
    more = Delta("b", 5, 4, "length", logprobs=(logprob("b"),) * num_more)
    events = streamed((half, CALLS[1], half, more), form_of(include=[LOGPROBS]))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [len(event["logprobs"]) for event in deltas][:2] == [num_tokens] * 2
    assert sum(len(event["logprobs"]) for event in deltas) == 2 * num_tokens + num_more
    response, kept = events[-1]["response"], 0 if num_more else num_tokens
    messages = [item["content"][0] for item in response["output"] if item["type"] == "message"]
    assert [len(part["logprobs"]) for part in messages] == [kept, kept]
    assert "".join(part["text"] for part in messages).startswith("aa")
    [_, done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert len(done["logprobs"]) == kept and EVENT.validate_python(done).type == done["type"]


def read_parts(response: Any) -> tuple[str, list[tuple[str, str, str]], str, list[Any]]:
    """Return the text, the calls, the status and the log probabilities of a response."""
    messages = [item for item in response["output"] if item["type"] == "message"]
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    text = "".join(part["text"] for item in messages for part in item["content"])
    scores = [entry["token"] for item in messages for part in item["content"] for entry in part["logprobs"]]
    return text, [(call["call_id"], call["name"], call["arguments"]) for call in calls], response["status"], scores


def test_calls_of_a_stream_are_whole_however_it_is_merged() -> None:
    for seed in range(100):
        deltas = random_calls(seed)
        *events, last = streamed(deltas, form_of())
        found = read_parts(whole(deltas, form_of()))
        assert found[1] and read_parts(last["response"]) == found, seed
        done = [event["arguments"] for event in events if event["type"] == "response.function_call_arguments.done"]
        assert done == [arguments for _, _, arguments in found[1]], seed


@pytest.mark.parametrize(
    ("given", "shown"),
    [({}, (0.5, 1.0)), ({"temperature": 1.0, "top_p": 0.9}, (1.0, 0.9)), ({"temperature": 0}, (0, 1))],
)
def test_a_response_shows_the_sampling_that_it_was_made_with(given: dict[str, float], shown: tuple[float, ...]) -> None:
    response = whole(DELTAS, form_of(**given))
    assert (response["temperature"], response["top_p"]) == shown
