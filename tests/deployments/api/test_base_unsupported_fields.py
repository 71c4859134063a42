"""What of the OpenAI API is not served is refused by name, and what asks for nothing is taken."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.api.base import OF_CHAT, OF_COMPLETIONS
from deployments.api.completions import parse
from deployments.errors import Unsupported
from tests.deployments.asking import error_of, post

USER = {"role": "user", "content": "Hi"}
CHAT = {"messages": [USER]}
TEXT = {"prompt": "Once"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ASKED: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "tools": [TOOL],
    "tool_choice": "auto",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "store": True,
    "service_tier": "priority",
    "use_beam_search": True,
    "echo": True,
    "suffix": "end",
    "best_of": 2,
}


@pytest.mark.parametrize("name", sorted(OF_CHAT))
def test_a_chat_field_that_is_not_served_is_refused_by_name(name: str) -> None:
    response = post("/v1/chat/completions", CHAT | {name: ASKED.get(name, {"some": "thing"})})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported", name)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", sorted(OF_COMPLETIONS))
def test_a_completions_field_that_is_not_served_is_refused_by_name(name: str) -> None:
    response = post("/v1/completions", TEXT | {name: ASKED.get(name, {"some": "thing"})})
    assert (response.status_code, error_of(response)["code"], error_of(response)["param"]) == (400, "unsupported", name)


@pytest.mark.parametrize(
    "fields", [{name: nothing} for name, values in OF_CHAT.items() for nothing in (*values, None)], ids=str
)
def test_a_chat_field_that_asks_for_nothing_is_taken(fields: dict[str, Any]) -> None:
    assert parse(CHAT | fields) == parse(CHAT)


@pytest.mark.parametrize(
    "fields", [{name: nothing} for name, values in OF_COMPLETIONS.items() for nothing in (*values, None)], ids=str
)
def test_a_completions_field_that_asks_for_nothing_is_taken(fields: dict[str, Any]) -> None:
    assert parse(TEXT | fields) == parse(TEXT)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u"},
        {"metadata": {"a": "b"}},
        {"safety_identifier": "s"},
        {"prompt_cache_key": "k"},
        {"parallel_tool_calls": False},
    ],
    ids=str,
)
def test_what_has_no_effect_on_an_answer_is_taken(fields: dict[str, Any]) -> None:
    assert post("/v1/chat/completions", CHAT | fields).status_code == 200


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content.0"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]},
            "messages.0.content.1",
        ),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "messages.0.tool_calls"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "messages.0.function_call"),
        ({"role": "assistant", "content": "", "refusal": "no"}, "messages.0.refusal"),
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages.0.role"),
    ],
    ids=str,
)
def test_messages_of_other_kinds_are_refused_by_their_place(message: dict[str, Any], param: str) -> None:
    with pytest.raises(Unsupported) as caught:
        parse({"messages": [message, USER]})
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2], [3]]])
def test_token_ids_are_refused_as_a_prompt(prompt: Any) -> None:
    with pytest.raises(Unsupported, match="token ids") as caught:
        parse({"prompt": prompt})
    assert caught.value.param == "prompt"


def test_what_is_not_supported_is_said_before_other_problems() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}], "temperature": 9}
    with pytest.raises(Unsupported):
        parse(body)


def test_equal_is_of_one_type() -> None:
    assert error_of(post("/v1/completions", TEXT | {"best_of": True}))["param"] == "best_of"
    assert error_of(post("/v1/completions", TEXT | {"echo": 0}))["param"] == "echo"
