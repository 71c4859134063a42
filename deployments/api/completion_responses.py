"""Answers to prompts in the shape of the OpenAI API, with a `lora` object that names the adapters that answered."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired
from urllib.parse import quote

from typing_extensions import TypedDict

from deployments.api.responses import Planned, PlanObject, plan_object
from deployments.json_types import JsonObject
from gpu_worker.request.request import Completion, Delta, FinishReason, TokenLogprob
from gpu_worker.request.tools import ToolCallPiece
from lora_store import LOCAL_TENANT, MAX_PLAN_ADAPTERS

_DIGEST_CHARS = 12
_EMPTY_HINT = {
    "chat": "If they were trained with another prompt template than the server's, publish them with `template` set.",
    "text": "/v1/completions applies no prompt template: use /v1/chat/completions, or write the template that the "
    "adapters were trained with into the prompt.",
}


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Alternative(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(TypedDict):
    content: list[ChatToken]
    refusal: None


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CalledFunctionObject(TypedDict):
    """`arguments`: a JSON object as text."""

    name: str
    arguments: str


class ToolCallObject(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunctionObject


class AnswerMessage(TypedDict):
    """`content` is null if the answer is calls alone."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[ToolCallObject]]


class ChatChoice(TypedDict):
    index: int
    finish_reason: FinishReason
    message: AnswerMessage
    logprobs: ChatLogprobs | None


class TextChoice(TypedDict):
    """`lora`: the plan of this choice's prompt, if the request has several prompts."""

    index: int
    finish_reason: FinishReason
    text: str
    logprobs: TextLogprobs | None
    lora: NotRequired[PlanObject]


class ChatAnswer(TypedDict):
    """`warning`: present if adapters ended an answer before its first text."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    lora: PlanObject
    warning: NotRequired[str]


class TextAnswer(TypedDict):
    """`lora`: the plan, if the request has one prompt. `warning`: as in a chat answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    lora: NotRequired[PlanObject]
    warning: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Answer:
    """Builds the whole answer or the chunks of one request. Choices are ordered by prompt, `num_choices` for each.

    With several prompts every choice has the `lora` object of its own prompt; with one prompt the answer has it.
    Adapters have the names that `tenant`, the caller's, uses for them.
    """

    kind: Literal["chat", "text"]
    model: str
    plans: Sequence[Planned]
    tenant: str = LOCAL_TENANT
    explain: bool = False
    num_choices: int = 1
    has_logprobs: bool = False
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completions: Sequence[Completion]) -> ChatAnswer | TextAnswer:
        """Return the whole answer."""
        answer = self._chat_answer(completions) if self.kind == "chat" else self._text_answer(completions)
        for index, completion in enumerate(completions):
            if not completion.text and not completion.tool_calls and (warning := self.empty_warning(index)):
                answer["warning"] = warning
                break
        return answer

    def empty_warning(self, index: int) -> str:
        """Return what to say of an empty choice; "" where the base model alone answered."""
        if not self.plans[index // self.num_choices].plan.adapters:
            return ""
        return f"choice {index} is empty: its adapters ended the answer at once. {_EMPTY_HINT[self.kind]}"

    def _chat_answer(self, completions: Sequence[Completion]) -> ChatAnswer:
        choices: list[ChatChoice] = [
            {
                "index": index,
                "finish_reason": completion.finish_reason,
                "message": _message(completion),
                "logprobs": chat_logprobs(completion.logprobs) if self.has_logprobs else None,
            }
            for index, completion in enumerate(completions)
        ]
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self._usage(completions),
            "lora": self._plan_of(0),
        }

    def _text_answer(self, completions: Sequence[Completion]) -> TextAnswer:
        choices: list[TextChoice] = [
            {
                "index": index,
                "finish_reason": completion.finish_reason,
                "text": completion.text,
                "logprobs": text_logprobs(completion.logprobs) if self.has_logprobs else None,
            }
            for index, completion in enumerate(completions)
        ]
        answer: TextAnswer = {
            "id": f"cmpl-{self.request_id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self._usage(completions),
        }
        if len(self.plans) == 1:
            answer["lora"] = self._plan_of(0)
        else:
            for choice in choices:
                choice["lora"] = self._plan_of(choice["index"])
        return answer

    def opening(self) -> JsonObject:
        """Return the first chunk of a stream: the role of every choice, and the plans before any text."""
        begun: JsonObject = {"delta": {"role": "assistant", "content": ""}} if self.kind == "chat" else {"text": ""}
        indices = range(len(self.plans) * self.num_choices)
        choices = [self._choice(index, None, None) | begun | self._own_lora(index) for index in indices]
        return self._chunk(choices) | ({"lora": self._plan_of(0)} if len(self.plans) == 1 else {})

    def chunk(self, index: int, delta: Delta) -> JsonObject:
        """Return the chunk for a delta of one choice."""
        choice = self._choice(index, delta.finish_reason, delta.logprobs or None)
        choice |= {"delta": _chat_delta(delta)} if self.kind == "chat" else {"text": delta.text}
        return self._chunk([choice])

    def empty_end(self, index: int, delta: Delta) -> JsonObject:
        """Return the last chunk of a choice that had no text."""
        warning = self.empty_warning(index)
        return self.chunk(index, delta) | ({"warning": warning} if warning else {})

    def usage_chunk(self, lasts: Sequence[Delta]) -> JsonObject:
        """Return the last chunk of a stream. `lasts`: the last delta of every choice, in order."""
        return self._chunk([]) | {"usage": self._usage(lasts)}

    def headers(self) -> dict[str, str]:
        """Return the plans as short headers, for clients that ignore the body. They list every adapter once."""
        strategies = dict.fromkeys(planned.plan.strategy for planned in self.plans)
        rows = list(dict.fromkeys(self._adapters_in_short()))
        reasons = dict.fromkeys(planned.reason for planned in self.plans if planned.reason is not None)
        more = ["..."] if len(rows) > MAX_PLAN_ADAPTERS else []
        return {
            "x-lora-strategy": ", ".join(strategies),
            "x-lora-adapters": ", ".join(rows[:MAX_PLAN_ADAPTERS] + more),
            "x-lora-generation": str(max(planned.plan.generation for planned in self.plans)),
        } | ({"x-lora-reason": ", ".join(reasons)} if reasons else {})

    def _adapters_in_short(self) -> Iterator[str]:
        """Yield `name@digest;weight=0.5`; the weight only if there is one prompt."""
        for planned in self.plans:
            for row in planned.plan.adapters:
                weight = f";weight={row.weight:.6g}" if len(self.plans) == 1 else ""
                yield f"{quote(row.ref.name_for(self.tenant), safe='/')}@{row.ref.digest[:_DIGEST_CHARS]}{weight}"

    def _choice(self, index: int, reason: str | None, logprobs: Sequence[TokenLogprob] | None) -> JsonObject:
        shape = chat_logprobs if self.kind == "chat" else text_logprobs
        return {"index": index, "finish_reason": reason, "logprobs": None if logprobs is None else shape(logprobs)}

    def _chunk(self, choices: list[JsonObject]) -> JsonObject:
        prefix, kind = ("chatcmpl", "chat.completion.chunk") if self.kind == "chat" else ("cmpl", "text_completion")
        identity = {"id": f"{prefix}-{self.request_id}", "object": kind, "created": self.created, "model": self.model}
        return identity | {"choices": choices}

    def _plan_of(self, index: int) -> PlanObject:
        """Return the plan of the choice's prompt."""
        return plan_object(self.plans[index // self.num_choices], self.tenant, explain=self.explain)

    def _own_lora(self, index: int) -> JsonObject:
        return {} if len(self.plans) == 1 else {"lora": self._plan_of(index)}

    def _usage(self, ends: Sequence[Completion] | Sequence[Delta]) -> Usage:
        """Count tokens as OpenAI does: a prompt counts once, however many answers it has.

        Of its answers the one that found the fewest cached tokens counts; the others may have found those of that one.
        """
        firsts = range(0, len(ends), self.num_choices)
        num_prompt = sum(ends[first].num_prompt_tokens for first in firsts)
        num_cached = sum(
            min(end.num_cached_tokens for end in ends[first : first + self.num_choices]) for first in firsts
        )
        num_new = sum(end.num_new_tokens for end in ends)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }


def _message(completion: Completion) -> AnswerMessage:
    if not completion.tool_calls:
        return {"role": "assistant", "content": completion.text}
    calls: list[ToolCallObject] = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in completion.tool_calls
    ]
    return {"role": "assistant", "content": completion.text or None, "tool_calls": calls}


def _chat_delta(delta: Delta) -> JsonObject:
    if not delta.tool_calls:
        return {"content": delta.text}
    return ({"content": delta.text} if delta.text else {}) | {"tool_calls": _call_deltas(delta.tool_calls)}


def _call_deltas(pieces: Sequence[ToolCallPiece]) -> list[JsonObject]:
    """Return one object for each call, the first of each with its id and the function's name."""
    calls: list[JsonObject] = []
    for piece in pieces:
        if piece.id is not None:
            function = {"name": piece.name, "arguments": piece.arguments}
            calls.append({"index": piece.index, "id": piece.id, "type": "function", "function": function})
        elif calls and calls[-1]["index"] == piece.index:
            calls[-1]["function"]["arguments"] += piece.arguments
        else:
            calls.append({"index": piece.index, "function": {"arguments": piece.arguments}})
    return calls


def chat_logprobs(entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Return one object per token. The text of a partial character is U+FFFD; its bytes are exact."""
    content: list[ChatToken] = [
        {**_entry(entry.token, entry.logprob), "top_logprobs": [_entry(*alternative) for alternative in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def text_logprobs(entries: Sequence[TokenLogprob]) -> TextLogprobs:
    """Return parallel lists. A token is always in its own `top_logprobs`, as an additional one if necessary."""
    return {
        "tokens": [_name(entry.token) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            {_name(token): logprob for token, logprob in (*entry.top, (entry.token, entry.logprob))}
            for entry in entries
        ],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _entry(token: bytes, logprob: float) -> Alternative:
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}


def _name(token: bytes) -> str:
    """Return the token as text, or `bytes:\\xe4` for a partial character: these are keys and must differ."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
