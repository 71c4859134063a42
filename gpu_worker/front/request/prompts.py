"""Prompt templates. The server defines them: adapters can only name one, and uploaded templates never run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from jinja2.exceptions import TemplateError

from gpu_worker.errors import PromptInvalid
from gpu_worker.front.request.tools import ToolCall

Role = Literal["system", "user", "assistant", "tool"]
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_STOPS = ("### Instruction:", "### Response:")
# What the code of a chat template raises for messages or tools that it does not expect.
TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. A turn of the role `tool` is the result of the call `call_id` of function `name`.

    In other roles `name` is the participant's. Only some chat templates read it.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Return all texts that become part of the prompt."""
        calls = [text for call in self.tool_calls for text in (call.id, call.name, call.arguments)]
        return (self.content, *calls, self.call_id, self.name)

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.texts))


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that the `chat` template needs."""

    chat_template: str | None

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str: ...


def alpaca_prompt(instruction: str) -> str:
    """Return the Alpaca prompt of one instruction. The paper's adapters and the starter pool are trained on it."""
    return render_alpaca([Message("user", instruction)])


def render_alpaca(messages: Sequence[Message]) -> str:
    """Render preamble, system text and Instruction / Response pairs. The prompt ends where the answer begins."""
    parts = [ALPACA_PREAMBLE]
    parts += [m.content for m in messages if m.role == "system" and m.content]
    for message in messages:
        if message.role == "user":
            parts.append(f"### Instruction:\n{message.content}")
        elif message.role == "assistant":
            parts.append(f"### Response:\n{message.content}")
    return "\n\n".join(parts) + "\n\n### Response:\n"


def render_chat(
    messages: Sequence[Message], tokenizer: ChatTokenizer, tools: list[dict[str, Any]] | None = None
) -> str:
    """Render with the tokenizer's chat template.

    Templates that want roles to alternate get the user's messages in a row as one.
    Raises: PromptInvalid if there is none or it rejects the messages or tools.
    """
    if not tokenizer.chat_template:
        raise PromptInvalid(
            "template 'chat' needs a chat template, but the base model's tokenizer has none; use template 'alpaca'"
        )
    conversation = [make_turn(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(conversation, tools, tokenize=False, add_generation_prompt=True)
    except TEMPLATE_FAILURES as exc:
        joined = _join_user_messages(messages)
        if len(joined) < len(messages):
            return render_chat(joined, tokenizer, tools)
        rejected = "messages" if tools is None else "messages or tools"
        raise PromptInvalid(f"the base model's chat template rejects the {rejected}: {exc}") from exc


def _join_user_messages(messages: Sequence[Message]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role == "user":
            name = message.name if joined[-1].name == message.name else ""
            joined[-1] = replace(message, content=f"{joined[-1].content}\n\n{message.content}", name=name)
        else:
            joined.append(message)
    return joined


def make_turn(message: Message) -> dict[str, Any]:
    """Return the message as chat templates read it. Invalid arguments stay text."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": _short_id(call.id), "type": "function", "function": {"name": call.name, "arguments": _value(call)}}
            for call in message.tool_calls
        ]
    if message.role == "tool":
        turn["tool_call_id"] = _short_id(message.call_id)
    if message.role == "tool" or message.name:
        turn["name"] = message.name
    return turn


def _short_id(call_id: str) -> str:
    """Return an id of nine letters and digits: some templates refuse any other."""
    is_short = re.fullmatch(r"[A-Za-z0-9]{9}", call_id) is not None
    return call_id if is_short else hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()[:9]


def _value(call: ToolCall) -> Any:
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return call.arguments


def resolve_template(template: str, tokenizer: ChatTokenizer) -> str:
    """Return `template`; for `auto` return `chat` if the tokenizer has a chat template, else `alpaca`."""
    if template != "auto":
        return template
    return "chat" if tokenizer.chat_template else "alpaca"


def render(messages: Sequence[Message], template: str, tokenizer: ChatTokenizer) -> str:
    """Render `messages` to the text that the model continues. Raises: PromptInvalid for an unknown template."""
    template = resolve_template(template, tokenizer)
    if template == "alpaca":
        return render_alpaca(messages)
    if template == "chat":
        return render_chat(messages, tokenizer)
    raise PromptInvalid(f"template must be 'auto', 'alpaca' or 'chat', got {template!r}")


def template_stops(template: str, tokenizer: ChatTokenizer) -> tuple[str, ...]:
    """Return the stop strings that the template adds to the client's."""
    return ALPACA_STOPS if resolve_template(template, tokenizer) == "alpaca" else ()
