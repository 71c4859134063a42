"""Messages and tools of a chat, and what is refused in them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.api.anthropic_request import MessagesRequest
from deployments.api.completions import ChatCompletionRequest, CompletionRequest
from deployments.api.error_table import validation_error
from deployments.api.messages import MAX_TOOLS
from deployments.api.responses_request import ResponsesRequest
from deployments.calls.catalogue_clients import serve_retriever
from deployments.errors import RequestInvalid, Unsupported
from deployments.generation.planner import Planner
from gpu_worker.errors import GrammarInvalid
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.tools import NO_PARAMETERS, Function, ToolCall, Tools
from tests.deployments.app_fakes import config_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.fakes import FakeHandle

USER = {"role": "user", "content": "Hi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Return it", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now", "strict": True}}
FUNCTIONS = (Function("get_weather", "Return it", json.dumps(CITY)), Function("now", "", NO_PARAMETERS, strict=True))
CALLED = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "Rain"}


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [USER], **fields})


def refusal(**fields: Any) -> RequestInvalid | Unsupported:
    with pytest.raises(ValidationError) as caught:
        chat(**fields)
    return validation_error(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Tools(FUNCTIONS)),
        ({"tool_choice": "auto"}, Tools(FUNCTIONS)),
        ({"tool_choice": "required", "parallel_tool_calls": False}, Tools(FUNCTIONS, required=True, is_parallel=False)),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, Tools(FUNCTIONS, True, "now")),
        ({"tool_choice": "none"}, None),
        ({"tool_choice": {"type": "none"}}, None),
        ({"tools": []}, None),
        ({"tools": None, "parallel_tool_calls": True}, None),
    ],
    ids=str,
)
def test_tools_and_the_choice_among_them(fields: dict[str, Any], expected: Tools | None) -> None:
    assert chat(**{"tools": [WEATHER, NOW], **fields}).used_tools() == expected
    assert CompletionRequest.model_validate({"prompt": "Hi"}).used_tools() is None


def test_the_name_of_a_participant_is_part_of_its_turn() -> None:
    [question] = chat(messages=[USER | {"name": "Ada"}, ASSISTANT | {"name": "Bo"}, RESULT | {"name": "x"}]).questions()
    assert isinstance(question.prompt, tuple)
    assert [turn.name for turn in question.prompt] == ["Ada", "Bo", "get_weather"], "a result has its function's name"


def test_calls_and_results_are_turns_of_the_conversation() -> None:
    [question] = chat(messages=[USER, ASSISTANT, RESULT], tools=[WEATHER]).questions()
    assert question.text == "Hi", "the user and not the tools finds the adapters"
    assert question.prompt == (
        Message("user", "Hi"),
        Message("assistant", "", (ToolCall("c1", "get_weather", '{"city": "Rome"}'),)),
        Message("tool", "Rain", (), "c1", "get_weather"),
    )


@pytest.mark.parametrize("given", [{}, {"arguments": ""}, {"arguments": "{}"}], ids=["none", "empty", "an object"])
def test_a_call_without_arguments_has_an_empty_object_as_in_other_apis(given: dict[str, str]) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", **given}}
    items = [{"type": "function_call", "call_id": "c1", "name": "now", "arguments": ""}]
    items.append({"type": "function_call_output", "call_id": "c1", "output": "Rain"})
    blocks = [{"type": "tool_use", "id": "c1", "name": "now"}]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "Rain"}]}
    requests = (
        chat(messages=[USER, ASSISTANT | {"tool_calls": [call]}, RESULT]),
        ResponsesRequest.model_validate({"input": [USER, *items]}),
        MessagesRequest.model_validate(
            {"messages": [USER, {"role": "assistant", "content": blocks}, result], "max_tokens": 9}
        ),
    )
    for request in requests:
        [question] = request.questions()
        assert question.prompt == (
            Message("user", "Hi"),
            Message("assistant", "", (ToolCall("c1", "now", "{}"),)),
            Message("tool", "Rain", (), "c1", "now"),
        )


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice", "needs tools"),
        (
            {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "nwo"}}},
            "tool_choice.function.name",
            "did you mean 'now'?",
        ),
        (
            {"tools": [NOW], "tool_choice": {"type": "function", "name": "now"}},
            "tool_choice.function",
            "is missing; type",
        ),
        (
            {"tools": [NOW], "tool_choice": {"type": "auto", "function": {"name": "now"}}},
            "tool_choice.function",
            "goes with type 'function' only; type is 'auto'",
        ),
        ({"tools": [NOW], "tool_choice": "always"}, "tool_choice.type", "'none', 'auto', 'required' or 'function'"),
        ({"tools": [NOW, WEATHER, NOW]}, "tools.2.function.name", "another function has the name 'now'"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0", "does not support tools of type 'custom'"),
        ({"tools": [{"function": {"name": "x"}}]}, "tools.0.type", "is missing"),
        ({"tools": [NOW], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "send only the allowed tools"),
        ({"tools": [NOW], "tool_choice": {"type": "custom", "custom": {}}}, "tool_choice", "only functions"),
        ({"tools": [NOW], "tool_choice": {"type": ["custom"]}}, "tool_choice.type", "'none', 'auto'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "must match"),
        ({"tools": [NOW] * (MAX_TOOLS + 1)}, "tools", "128"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": {"name": "f"}}, "function_call", "use tools and tool_choice"),
        ({"messages": [USER, RESULT]}, "messages.1.tool_call_id", "no message before this one"),
        ({"messages": [RESULT, ASSISTANT]}, "messages.0.tool_call_id", "no message before this one"),
        ({"messages": [USER, ASSISTANT, RESULT | {"tool_call_id": None}]}, "messages.2.tool_call_id", "role 'tool'"),
        ({"messages": [USER | {"tool_call_id": "c1"}]}, "messages.0.tool_call_id", "is required in messages of role"),
        ({"messages": [USER | {"tool_calls": [CALLED]}]}, "messages.0.tool_calls", "role 'assistant'"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content", "is missing"),
        ({"messages": [USER, {"role": "function", "content": "x"}]}, "messages.1.role", "use role 'tool'"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": ""}]}]}, "messages.1.tool_calls.0.id", "1 character"),
    ],
    ids=str,
)
def test_a_mistake_is_refused_with_its_place_and_a_remedy(fields: dict[str, Any], param: str, text: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert text in str(error)


def test_a_schema_that_json_cannot_hold_is_refused() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"const": float("nan")}}}
    with pytest.raises(GrammarInvalid) as caught:
        chat(tools=[tool]).used_tools()
    assert caught.value.param == "tools.0.function.parameters"


def test_tools_calls_and_results_count_as_work() -> None:
    plain, more = chat(max_tokens=1), chat(max_tokens=1, tools=[WEATHER], messages=[USER, ASSISTANT, RESULT])
    texts = len("Hi" + "Rain" + "c1" * 2 + "get_weather" * 2 + '{"city": "Rome"}')
    tokens = [math.ceil(num_chars / 4) for num_chars in (texts, Tools(FUNCTIONS[:1]).num_chars, len("Hi"))]
    config = config_of()
    retriever = serve_retriever(FakeHandle(FakeRetriever(())))
    planner = Planner(config.served_models, config.retrieval, retriever)
    found = [
        planner.measure_work(request, request.sampling(), request.questions()).num_tokens for request in (more, plain)
    ]
    assert found[0] - found[1] == tokens[0] + tokens[1] - tokens[2]


def test_unknown_fields_of_tools_are_ignored_and_schemas_kept() -> None:
    tool = {**NOW, "cache_control": {}, "function": {"name": "now", "parameters": CITY, "examples": []}}
    tools = chat(tools=[tool]).used_tools()
    assert tools is not None and json.loads(tools.functions[0].parameters) == CITY
