"""Prompts with tools: through a chat template that knows them, or described by a system text."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpu_worker.errors import PromptInvalid
from gpu_worker.front.request.prompts import (
    TEMPLATE_FAILURES,
    ChatTokenizer,
    Message,
    Role,
    make_turn,
    render,
    render_chat,
    resolve_template,
)
from gpu_worker.front.request.tool_parser import ToolCallParser
from gpu_worker.front.request.tools import (
    DESCRIBED,
    FORMS,
    Function,
    ToolCall,
    ToolForm,
    Tools,
    ToolStyle,
    joined_calls,
)

logger = logging.getLogger(__name__)

_PROBE = Function("probe_the_weather_of", "Return the weather", '{"type": "object", "properties": {"a": {}}}')
_QUESTION = Message("user", "How is the weather?")
_CALLS = tuple(ToolCall(f"call0000{n}", _PROBE.name, json.dumps({"a": n})) for n in range(2))


def find_style(tokenizer: ChatTokenizer, parser: str = "auto") -> ToolStyle:
    """Return how the tokenizer's chat template handles tools.

    The form of its calls is the one whose parser reads a call back from what the template writes for it. `parser`
    names the form instead. A template that does not show functions, or writes calls in no known form, is described
    tools by a system text.
    """
    if not tokenizer.chat_template:
        return DESCRIBED
    question = _rendered(tokenizer, [_QUESTION], add_generation_prompt=True)
    if question is None or _PROBE.name not in question:
        return DESCRIBED
    forms = [form for form in FORMS if parser in ("auto", form.name)]
    for form in forms:
        has_parallel = _reads_back(tokenizer, question, form, 2)
        if has_parallel or _reads_back(tokenizer, question, form, 1) or parser == form.name:
            return ToolStyle(form, is_native=True, has_parallel=has_parallel)
    if parser == "auto":
        logger.warning("the chat template writes tool calls in an unknown form; a system text describes tools instead")
    return DESCRIBED


def _reads_back(tokenizer: ChatTokenizer, question: str, form: ToolForm, num_calls: int) -> bool:
    """Return whether the form's parser finds the calls that the template writes."""
    calls = _CALLS[:num_calls]
    text = _rendered(tokenizer, [_QUESTION, Message("assistant", "", calls)], add_generation_prompt=False)
    if text is None:
        return False
    both = zip(question, text, strict=False)
    begin = next((place for place, (a, b) in enumerate(both) if a != b), min(len(question), len(text)))
    _, pieces, _ = ToolCallParser(form, {_PROBE.name}).read(text[begin:], "stop")
    return [(call.name, call.arguments) for call in joined_calls(pieces)] == [(c.name, c.arguments) for c in calls]


def _rendered(tokenizer: ChatTokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> str | None:
    turns, tools = [make_turn(message) for message in messages], [_as_json(_PROBE)]
    try:
        return tokenizer.apply_chat_template(turns, tools, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TEMPLATE_FAILURES:
        return None


def _as_json(function: Function) -> dict[str, Any]:
    return {"type": "function", "function": function.as_json}


def choose_style(template: str, tokenizer: ChatTokenizer, chat_style: ToolStyle) -> ToolStyle:
    """Return the style of a job's template. `chat_style`: the style of the chat template."""
    return chat_style if resolve_template(template, tokenizer) == "chat" else DESCRIBED


def render_conversation(
    messages: Sequence[Message], template: str, tokenizer: ChatTokenizer, chat_style: ToolStyle, tools: Tools | None
) -> str:
    """Render messages and tools to the text that the model continues. Raises: PromptInvalid."""
    if tools is None and not any(message.role == "tool" or message.tool_calls for message in messages):
        return render(messages, template, tokenizer)
    if choose_style(template, tokenizer, chat_style).is_native:
        return render_chat(messages, tokenizer, None if tools is None else [*map(_as_json, tools.functions)])
    plain = without_tool_turns(messages)
    if tools is None:
        return render(plain, template, tokenizer)
    described = with_system_text(plain, describe(tools))
    try:
        return render(described, template, tokenizer)
    except PromptInvalid:  # perhaps the template takes no system text
        if any(message.role == "system" for message in plain):
            raise
        first = replace(plain[0], content=f"{describe(tools)}\n\n{plain[0].content}")
        return render([first, *plain[1:]], template, tokenizer)


def describe(tools: Tools) -> str:
    """Return a text that describes the functions, and how to call them, to a model without a form of its own."""
    if tools.only is not None:
        when = f"Call the function {tools.only} now."
    elif tools.required:
        when = "Call one of them now."
    else:
        when = "Call one if that helps to answer. Otherwise answer as usual."
    functions = "\n".join(json.dumps(function.as_json, ensure_ascii=False) for function in tools.functions)
    call = call_text({"name": "the name of a function", "arguments": {"the name of a parameter": "its value"}})
    return (
        f"You can call these functions. The parameters are a JSON schema:\n{functions}\n\n{when} A call has this"
        f" form:\n{call}\nThe result of a call follows between <tool_response> and </tool_response>."
    )


def call_text(call: Mapping[str, object]) -> str:
    """Return a call in the form that `describe` explains."""
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def without_tool_turns(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation as text: calls become a part of the answer, results a part of the user's next turn."""
    turns: list[Message] = []
    follows_result = False
    for message in messages:
        role: Role = "user" if message.role == "tool" else message.role
        text = _plain_text(message)
        if role == "user" and turns and turns[-1].role == "user" and (follows_result or message.role == "tool"):
            turns[-1] = Message("user", f"{turns[-1].content}\n{text}")
        else:
            turns.append(Message(role, text))
        follows_result = message.role == "tool"
    return turns


def _plain_text(message: Message) -> str:
    if message.role == "tool":
        return f"<tool_response>\n{message.content}\n</tool_response>"
    called = [call["function"] for call in make_turn(message).get("tool_calls", [])]
    calls = [call_text({"name": call["name"], "arguments": call["arguments"]}) for call in called]
    return "\n".join(filter(None, [message.content, *calls]))


def with_system_text(messages: Sequence[Message], text: str) -> list[Message]:
    """Append the text to the first message if that is a system text, else put it before all messages."""
    if messages[0].role == "system":
        return [replace(messages[0], content=f"{messages[0].content}\n\n{text}"), *messages[1:]]
    return [Message("system", text), *messages]
