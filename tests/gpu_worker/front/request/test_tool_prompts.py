"""Prompts with tools, and the form of calls that a chat template shows."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from gpu_worker.errors import PromptInvalid
from gpu_worker.front.request.prompts import Message, render
from gpu_worker.front.request.tool_prompts import (
    call_text,
    choose_style,
    describe,
    find_style,
    render_conversation,
    with_system_text,
    without_tool_turns,
)
from gpu_worker.front.request.tools import (
    DESCRIBED,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_ARGS,
    Function,
    ToolCall,
    ToolForm,
    Tools,
    ToolStyle,
)
from tests.gpu_worker.chat_templates import HERMES_TEMPLATE, TEMPLATES, UNKNOWN_TEMPLATE
from tests.tiny import byte_tokenizer

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = Tools((Function("get_weather", "Return the weather", json.dumps(CITY)),))
ASKED = Message("user", "How is it in Rome?")
CALL = ToolCall("call_1", "get_weather", '{"city": "Rome"}')
DEEP = reduce(lambda schema, _: {"items": schema}, range(400), {})
LOOP = [ASKED, Message("assistant", "", (CALL,)), Message("tool", "Rain", (), "call_1", "get_weather")]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rendered(messages: list[Message], template: str | None, tools: Tools | None = TOOLS, name: str = "auto") -> str:
    tokenizer = tokenizer_with(template)
    return render_conversation(messages, name, tokenizer, find_style(tokenizer), tools)


@pytest.mark.parametrize(
    ("name", "form", "has_parallel"),
    [
        ("hermes", HERMES, True),
        ("mistral", MISTRAL, True),
        ("mistral_args", MISTRAL_ARGS, True),
        ("llama3_json", LLAMA3_JSON, False),
    ],
)
def test_the_form_of_calls_is_the_one_that_the_template_writes(name: str, form: ToolForm, has_parallel: bool) -> None:
    assert find_style(tokenizer_with(TEMPLATES[name])) == ToolStyle(form, is_native=True, has_parallel=has_parallel)
    text = rendered(LOOP, TEMPLATES[name])  # calls and results of another server
    assert "Rain" in text and text.index("Rome") < text.index("Rain")


@pytest.mark.parametrize(
    "template",
    [None, "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ raise_exception('no tools') }}", UNKNOWN_TEMPLATE],
)
def test_a_template_without_tools_or_with_calls_of_another_form_is_described_them(template: str | None) -> None:
    assert find_style(tokenizer_with(template)) == DESCRIBED


def test_the_operator_can_name_the_form() -> None:
    assert find_style(tokenizer_with(UNKNOWN_TEMPLATE), "mistral") == ToolStyle(MISTRAL, is_native=True)
    assert find_style(tokenizer_with(HERMES_TEMPLATE), "llama3_json") == ToolStyle(LLAMA3_JSON, is_native=True)
    assert find_style(tokenizer_with(None), "mistral") == DESCRIBED


def test_a_template_that_knows_tools_gets_them_calls_and_results() -> None:
    text = rendered(LOOP, HERMES_TEMPLATE)
    assert '"name": "get_weather", "description": "Return the weather"' in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>' in text
    assert "<|im_start|>user\n<tool_response>\nRain\n</tool_response><|im_end|>\n<|im_start|>assistant\n" in text


@pytest.mark.parametrize(
    ("code", "schema"),
    [
        ("{{ parameters.properties|dictsort }}", {"properties": "none"}),
        ("{{ '%(type)s' % parameters }}", {"title": "no type"}),
        ("{{ 10 // parameters.properties|length }}", {"properties": {}}),
        ("{{ range(parameters.maxItems) }}", {"maxItems": 10**9}),
        ("{% macro f(s) %}{{ f(s['items']) if s else 1 }}{% endmacro %}{{ f(parameters) }}", DEEP),
    ],
    ids=["AttributeError", "KeyError", "ZeroDivisionError", "OverflowError", "RecursionError"],
)
def test_a_tool_that_the_templates_code_cannot_read_is_refused(code: str, schema: dict[str, Any]) -> None:
    template = f"{HERMES_TEMPLATE}{{% set parameters = tools[0].function.parameters %}}{code}"
    tokenizer, tools = tokenizer_with(template), Tools((Function("f", "", json.dumps(schema)),))
    with pytest.raises(PromptInvalid, match="rejects the messages or tools"):
        render_conversation([ASKED], "chat", tokenizer, ToolStyle(HERMES, is_native=True), tools)


@pytest.mark.parametrize("name", ["alpaca", "auto"])
def test_alpaca_gets_a_description_and_the_calls_as_text(name: str) -> None:
    text = rendered(LOOP, None, name=name)
    shown = call_text({"name": "get_weather", "arguments": {"city": "Rome"}})
    assert f"### Response:\n{shown}" in text
    assert "### Instruction:\n<tool_response>\nRain\n</tool_response>\n\n### Response:\n" in text
    assert describe(TOOLS) in text and text.index(describe(TOOLS)) < text.index("### Instruction")


def test_an_adapter_of_another_template_is_described_the_tools() -> None:
    tokenizer = tokenizer_with(HERMES_TEMPLATE)
    style = find_style(tokenizer)
    assert choose_style("alpaca", tokenizer, style) == DESCRIBED and choose_style("auto", tokenizer, style) == style
    text = render_conversation([ASKED], "alpaca", tokenizer, style, TOOLS)
    assert describe(TOOLS) in text and "<|im_start|>" not in text


def test_a_template_that_takes_no_system_text_gets_the_description_in_the_first_turn() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    assert rendered([ASKED], template) == f"[user]{describe(TOOLS)}\n\n{ASKED.content}"
    with pytest.raises(PromptInvalid, match="no system"):
        rendered([Message("system", "Be brief."), ASKED], template)


def test_a_conversation_without_tools_is_rendered_as_ever_with_its_calls() -> None:
    turns = [ASKED, Message("assistant", "Fine"), ASKED]
    tokenizer = tokenizer_with(HERMES_TEMPLATE)
    assert rendered(turns, HERMES_TEMPLATE, None) == render(turns, "auto", tokenizer)
    for template in (None, HERMES_TEMPLATE):
        history = rendered(LOOP, template, None)
        assert "<tool_call>" in history and "can call" not in history, "calls stay in it"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "Call one if that helps"),
        ({"required": True}, "Call one of them now"),
        ({"only": "get_weather"}, "function get_weather now"),
    ],
)
def test_the_description_says_when_to_call(changes: dict[str, Any], text: str) -> None:
    assert text in describe(Tools(TOOLS.functions, **changes))
    assert json.dumps(TOOLS.functions[0].as_json) in describe(TOOLS)


def test_results_and_the_next_question_are_one_turn() -> None:
    more = [*LOOP, Message("tool", "Sun", (), "call_2", "get_weather"), Message("user", "So?")]
    turns = without_tool_turns(more)
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    result = "<tool_response>\n{}\n</tool_response>"
    assert turns[-1].content == f"{result.format('Rain')}\n{result.format('Sun')}\nSo?"
    assert without_tool_turns([ASKED, ASKED]) == [ASKED, ASKED]
    [turn] = without_tool_turns([Message("assistant", "Hm", (ToolCall("1", "f", "{broken"),))])
    assert turn.content == "Hm\n" + call_text({"name": "f", "arguments": "{broken"}), "invalid arguments stay text"


def test_arguments_that_a_template_cannot_read_are_refused() -> None:
    template = (
        "{{ tools }}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | items | list }}"
    )
    tokenizer = tokenizer_with(f"{template}{{% endfor %}}{{% endfor %}}")
    turns = [ASKED, Message("assistant", "", (ToolCall("1", "f", "[1]"),))]
    with pytest.raises(PromptInvalid, match="rejects the messages"):
        render_conversation(turns, "chat", tokenizer, ToolStyle(HERMES, is_native=True), TOOLS)


def test_the_description_follows_the_system_text() -> None:
    assert with_system_text([Message("system", "A"), ASKED], "B") == [Message("system", "A\n\nB"), ASKED]
    assert with_system_text([ASKED], "B") == [Message("system", "B"), ASKED]
