"""The request of `/v1/responses`: which chat it is, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.api.base import ignored_fields
from deployments.api.completions import ChatCompletionRequest
from deployments.api.error_table import validation_error
from deployments.api.responses_request import LOGPROBS, ResponsesRequest
from deployments.errors import RequestInvalid, Unsupported
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.prompts import Message

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
USER = {"role": "user", "content": "Hi"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}


def asked(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"input": "Hi"} | fields)


def refusal(**fields: Any) -> RequestInvalid | Unsupported:
    with pytest.raises(ValidationError) as caught:
        asked(**fields)
    return validation_error(caught.value)


def prompt_of(request: ResponsesRequest | ChatCompletionRequest) -> Any:
    [question] = request.questions()
    return question.prompt, question.text


def test_a_text_is_one_user_message() -> None:
    assert prompt_of(asked()) == ((Message("user", "Hi"),), "Hi")


def test_empty_instructions_are_no_turn() -> None:
    assert prompt_of(asked(instructions="")) == prompt_of(asked())


def test_instructions_and_items_are_the_chat_with_the_same_messages() -> None:
    items = [
        {"type": "message", "role": "user", "content": "one", "status": "completed", "id": "msg_1"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {
            "id": "msg_2",
            "type": "message",
            "role": "assistant",
            "phase": "final_answer",
            "content": [{"type": "output_text", "text": "1", "annotations": [], "logprobs": []}],
        },
        {"role": "developer", "content": "Count"},
        {"role": "user", "content": [{"type": "input_text", "text": "t"}, {"type": "input_text", "text": "wo"}]},
    ]
    request = asked(input=items, instructions="Be brief")
    turns = [("system", "Be brief"), ("user", "one"), ("assistant", "1"), ("developer", "Count"), ("user", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert prompt_of(request) == prompt_of(ChatCompletionRequest.model_validate({"messages": messages}))
    assert prompt_of(request)[1] == "two"
    assert ignored_fields(request) == ()


def test_fields_become_the_same_sampling_as_those_of_a_chat() -> None:
    shared = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "top_k": 4}
    request = asked(max_output_tokens=7, top_logprobs=2, include=[LOGPROBS], **shared)
    chat = {"messages": [USER], "max_tokens": 7, "logprobs": True, "top_logprobs": 2, **shared}
    assert request.sampling() == ChatCompletionRequest.model_validate(chat).sampling()


@pytest.mark.parametrize(
    ("fields", "num"), [({}, None), ({"include": [LOGPROBS]}, 0), ({"top_logprobs": 3}, 3), ({"top_logprobs": 0}, None)]
)
def test_logprobs_are_reported_if_they_are_included_or_counted(fields: dict[str, Any], num: int | None) -> None:
    assert asked(**fields).num_logprobs == num


def test_max_output_tokens_precedes_max_tokens() -> None:
    assert [asked(max_tokens=9, **more).token_limit for more in ({}, {"max_output_tokens": 3})] == [9, 3]


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        (
            {"type": "json_schema", "name": "a", "strict": True, "schema": SCHEMA},
            Grammar("json_schema", json.dumps(SCHEMA), "text.format.schema"),
        ),
        ({"type": "json_object"}, Grammar("json_schema", '{"type": "object"}', "text.format")),
        ({"type": "text"}, None),
    ],
)
def test_the_format_of_the_text_is_the_grammar_and_is_repeated(given: dict[str, Any], grammar: Grammar | None) -> None:
    request = asked(text={"format": given, "verbosity": "medium"})
    found = request.sampling().grammar
    assert found == grammar and (found is None or grammar is None or found.param == grammar.param)
    assert request.text_format == {"format": given}
    assert ignored_fields(request) == ()


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"response_format": {"type": "text"}}, {"type": "text"}),
        ({"response_format": {"type": "json_object"}}, {"type": "json_object"}),
        ({"text": {"format": {"type": "text"}}, "response_format": {"type": "json_object"}}, {"type": "json_object"}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"type": "json_schema", "schema": SCHEMA}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": SCHEMA},
                }
            },
            {"type": "json_schema", "name": "a", "strict": True, "schema": SCHEMA},
        ),
        ({"structured_outputs": {"json": SCHEMA}}, {"type": "json_schema", "schema": SCHEMA}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"type": "json_schema"}),
        ({"structured_outputs": {"json_object": True}}, {"type": "json_object"}),
        (
            {"response_format": {"type": "text"}, "structured_outputs": {"json_object": True}},
            {"type": "json_object"},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"type": "text"}),
    ],
    ids=str,
)
def test_the_response_shows_the_format_of_the_other_fields_too(fields: dict[str, Any], shown: dict[str, Any]) -> None:
    assert asked(**fields).text_format == {"format": shown}


def test_a_request_without_a_format_has_no_grammar_unless_in_another_spelling() -> None:
    assert asked().sampling().grammar is None
    assert asked().text_format == {"format": {"type": "text"}}
    assert asked(structured_outputs={"regex": "a+"}).sampling().grammar == Grammar("regex", "a+", "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [USER, {"role": "user"}]}, "input.1.content"),
        ({"input": [{"content": "Hi"}]}, "input.0.role"),
        ({"input": [USER, {"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.1.call_id"),
        ({"input": [USER, {"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input.1.call_id"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "get_whether"}}, "tool_choice.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"role": "tool", "content": "Hi"}]}, "input.0.role"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object", "schema": SCHEMA}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "response_format": {"type": "json_object"}}, "text.format"),
        ({"lora": {"explian": True}}, "lora.explian"),
        ({"lora_path": ["a", "b"]}, "lora_path"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert isinstance(error, RequestInvalid) and error.param == param


@pytest.mark.parametrize(
    ("fields", "param", "remedy"),
    [
        ({"conversation": {"id": "conv_1"}}, "conversation", "send the whole conversation in input"),
        ({"background": True}, "background", "set stream: true"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "send the text in input"),
        ({"truncation": "auto"}, "truncation", "shorten input"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "use /v1/chat/completions"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "as clients do with store: false"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", "leave it out"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "leave it out"),
    ],
)
def test_an_unserved_field_is_refused_with_a_remedy(fields: dict[str, Any], param: str, remedy: str) -> None:
    error = refusal(**fields)
    assert isinstance(error, Unsupported) and error.param == param
    assert remedy in str(error)


def test_fields_that_ask_for_nothing_pass_and_others_are_listed() -> None:
    nothing = {"store": False, "background": False, "truncation": "disabled", "tools": [], "tool_choice": "auto"}
    more = {"service_tier": "auto", "previous_response_id": None, "reasoning": {}, "parallel_tool_calls": True}
    assert ignored_fields(asked(**nothing, **more)) == ()
    for choice in ("none", {"type": "none"}):
        assert asked(tools=[TOOL], tool_choice=choice).used_tools() is None
    declined = {"tools": [{"type": "web_search"}], "tool_choice": "none"}
    listed = ignored_fields(asked(**declined, reasoning={"effort": "low"}, text={"verbosity": "low"}, store=True))
    assert set(listed) == {"reasoning", "store", "text.verbosity"}


def test_calls_and_their_outputs_are_those_of_the_same_chat() -> None:
    items = [
        USER,
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait"}]},
        {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "g", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "b", "output": "2"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "1"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "3"},
    ]
    f, g = {"name": "f", "arguments": "{}"}, {"name": "g", "arguments": '{"x": 1}'}
    messages = [
        USER,
        {
            "role": "assistant",
            "content": "Wait",
            "tool_calls": [{"id": "a", "function": f}, {"id": "b", "function": g}],
        },
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": f}]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ]
    request = asked(input=items)
    assert prompt_of(request) == prompt_of(ChatCompletionRequest.model_validate({"messages": messages}))
    assert ignored_fields(request) == ()


@pytest.mark.parametrize("choice", [None, "auto", "required", "get_weather"])
@pytest.mark.parametrize("is_parallel", [None, False])
def test_tools_are_those_of_the_same_chat_and_are_repeated(choice: str | None, is_parallel: bool | None) -> None:
    named = choice == "get_weather"
    own: Any = {"type": "function", "name": choice} if named else choice
    of_chat: Any = {"type": "function", "function": {"name": choice}} if named else choice
    shared = {"parallel_tool_calls": is_parallel}
    request = asked(tools=[TOOL | {"strict": True}], tool_choice=own, **shared)
    function = {"name": "get_weather", "parameters": PARAMETERS, "strict": True}
    chat = {"messages": [USER], "tools": [{"type": "function", "function": function}], "tool_choice": of_chat, **shared}
    assert request.used_tools() == ChatCompletionRequest.model_validate(chat).used_tools()
    assert request.shown_tools == [TOOL | {"strict": True}]
    assert request.shown_choice == (own or "auto")
