"""Prompt templates. The server defines them: adapters can only name one, and uploaded templates never run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from jinja2.exceptions import TemplateError

from gpu_worker.errors import PromptInvalid

Role = Literal["system", "user", "assistant"]
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_STOPS = ("### Instruction:", "### Response:")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that the `chat` template needs."""

    chat_template: str | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


def alpaca_prompt(instruction: str) -> str:
    """Return the Alpaca prompt of one instruction. The paper's adapters and the starter pool are trained on it."""
    return render_alpaca([Message("user", instruction)])


def render_alpaca(messages: Sequence[Message]) -> str:
    """Render preamble, system text and Instruction / Response pairs. The prompt ends where the answer begins."""
    parts = [ALPACA_PREAMBLE]
    parts += [m.content for m in messages if m.role == "system"]
    for message in messages:
        if message.role == "user":
            parts.append(f"### Instruction:\n{message.content}")
        elif message.role == "assistant":
            parts.append(f"### Response:\n{message.content}")
    return "\n\n".join(parts) + "\n\n### Response:\n"


def render_chat(messages: Sequence[Message], tokenizer: ChatTokenizer) -> str:
    """Render with the tokenizer's chat template. Raises: PromptInvalid if there is none or it rejects the messages."""
    if not tokenizer.chat_template:
        raise PromptInvalid(
            "template 'chat' needs a chat template, but the base model's tokenizer has none; use template 'alpaca'"
        )
    conversation = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as exc:
        raise PromptInvalid(f"the base model's chat template rejects the messages: {exc}") from exc


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
