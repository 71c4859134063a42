from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.api.completions import ChatCompletionRequest
from deployments.api.error_table import validation_error
from deployments.api.tokens import DetokenizeRequest, TokenizeRequest
from gpu_worker.front.request.prompts import Message


def test_a_text_and_a_conversation_become_prompts() -> None:
    assert TokenizeRequest(prompt="").question().prompt == ""
    chat = TokenizeRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], "model": "poet"})
    assert (chat.question().prompt, chat.question().model) == ((Message("user", "Hi"),), "poet")


def test_a_conversation_with_calls_has_the_turns_of_a_chat() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    [asked] = ChatCompletionRequest.model_validate({"messages": messages}).questions()
    found = TokenizeRequest.model_validate({"messages": messages}).question()
    assert (found.prompt, found.text) == (asked.prompt, asked.text)


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (TokenizeRequest, {}, "prompt"),
        (TokenizeRequest, {"prompt": "a", "messages": [{"role": "user", "content": "Hi"}]}, "prompt"),
        (TokenizeRequest, {"messages": []}, "messages"),
        (TokenizeRequest, {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        (DetokenizeRequest, {"tokens": []}, "tokens"),
        (DetokenizeRequest, {"tokens": [1, -1]}, "tokens.1"),
        (DetokenizeRequest, {"tokens": ["1"]}, "tokens.0"),
    ],
)
def test_a_request_without_tokens_is_refused_by_field(kind: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert validation_error(caught.value).param == param
