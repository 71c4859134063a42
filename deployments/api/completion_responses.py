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
from gpu_worker.request.request import Completion, Delta, FinishReason, PromptToken, TokenLogprob
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
    """Parallel lists. The first token of an echoed prompt has None, because nothing is before it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """vLLM's entry for one id. `rank`: its place among all ids, from 1."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt the entries of the most likely ids and of the token itself, by id; None for the first.
"""


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
    """`lora`: the plan of this choice's prompt, if the request has several prompts. `prompt_logprobs`: if requested."""

    index: int
    finish_reason: FinishReason
    text: str
    logprobs: TextLogprobs | None
    lora: NotRequired[PlanObject]
    prompt_logprobs: NotRequired[PromptLogprobs]


class ChatAnswer(TypedDict):
    """`warning`: present if adapters ended an answer before its first text. `prompt_logprobs`: if requested."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    lora: PlanObject
    warning: NotRequired[str]
    prompt_logprobs: NotRequired[PromptLogprobs]


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
    Adapters have the names that `tenant`, the caller's, uses for them. `num_logprobs` and `num_prompt_logprobs`: how
    many alternatives to report for each token; None for no log probabilities. `echo`: the text of each prompt, which
    its choices begin with.
    """

    kind: Literal["chat", "text"]
    model: str
    plans: Sequence[Planned]
    tenant: str = LOCAL_TENANT
    explain: bool = False
    num_choices: int = 1
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    echo: Sequence[str] | None = None
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completions: Sequence[Completion]) -> ChatAnswer | TextAnswer:
        """Return the whole answer."""
        answer = self._chat_answer(completions) if self.kind == "chat" else self._text_answer(completions)
        for index, completion in enumerate(completions):
            is_empty = not completion.text and not completion.tool_calls and completion.num_new_tokens > 0
            if is_empty and (warning := self.empty_warning(index)):
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
                "logprobs": None if self.num_logprobs is None else chat_logprobs(completion.logprobs),
            }
            for index, completion in enumerate(completions)
        ]
        answer: ChatAnswer = {
            "id": f"chatcmpl-{self.request_id}",
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self._usage(completions),
            "lora": self._plan_of(0),
        }
        if self.num_prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(completions[0].prompt, self.num_prompt_logprobs)
        return answer

    def _text_answer(self, completions: Sequence[Completion]) -> TextAnswer:
        choices: list[TextChoice] = [
            {
                "index": index,
                "finish_reason": completion.finish_reason,
                "text": self._echoed(index) + completion.text,
                "logprobs": None
                if self.num_logprobs is None
                else self._text_logprobs(index, completion.prompt, completion.logprobs),
            }
            for index, completion in enumerate(completions)
        ]
        if self.num_prompt_logprobs is not None:
            for choice, completion in zip(choices, completions, strict=True):
                choice["prompt_logprobs"] = prompt_logprobs(completion.prompt, self.num_prompt_logprobs)
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
        choices = [
            {"index": index, "finish_reason": None, "logprobs": None} | begun | self._own_lora(index)
            for index in indices
        ]
        return self._chunk(choices) | ({"lora": self._plan_of(0)} if len(self.plans) == 1 else {})

    def chunk(self, index: int, delta: Delta, *, is_first: bool = False, is_empty: bool = False) -> JsonObject:
        """Return the chunk for a delta of one choice.

        `is_first`: it is the choice's first one. `is_empty`: it is the last one, and none had text.
        """
        logprobs: ChatLogprobs | TextLogprobs | None = None
        prompt = delta.prompt if is_first else ()
        if self.kind == "chat":
            logprobs = chat_logprobs(delta.logprobs) if delta.logprobs else None
        elif delta.logprobs or (prompt and self.echo is not None and self.num_logprobs is not None):
            logprobs = self._text_logprobs(index, prompt, delta.logprobs)
        choice: JsonObject = {"index": index, "finish_reason": delta.finish_reason, "logprobs": logprobs}
        text = (self._echoed(index) if is_first else "") + delta.text
        choice |= {"delta": _chat_delta(delta)} if self.kind == "chat" else {"text": text}
        warning = self.empty_warning(index) if is_empty and delta.num_new_tokens else ""
        return self._chunk([choice]) | ({"warning": warning} if warning else {})

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

    def _echoed(self, index: int) -> str:
        """Return the text of the prompt that the choice begins with; "" without `echo`."""
        return "" if self.echo is None else self.echo[index // self.num_choices]

    def _text_logprobs(self, index: int, prompt: Sequence[PromptToken], answer: Sequence[TokenLogprob]) -> TextLogprobs:
        """Return the log probabilities of the answer, after those of the prompt if it is echoed."""
        if self.echo is None:
            return text_logprobs(answer)
        return text_logprobs(answer, prompt, self.num_logprobs or 0, len(self._echoed(index)))

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


def text_logprobs(
    entries: Sequence[TokenLogprob], prompt: Sequence[PromptToken] = (), num_top: int = 0, num_chars: int = 0
) -> TextLogprobs:
    """Return parallel lists. A token is always in its own `top_logprobs`, as an additional one if necessary.

    `prompt`: the tokens before the answer, each with `num_top` alternatives; their text has `num_chars` characters.
    """
    known: list[tuple[bytes, float | None, dict[str, float] | None, int]] = [
        (item.token, item.logprob, _alternatives(item, num_top), item.text_offset) for item in prompt
    ]
    for entry in entries:
        top = {_name(token): logprob for token, logprob in (*entry.top, (entry.token, entry.logprob))}
        known.append((entry.token, entry.logprob, top, num_chars + entry.text_offset))
    return {
        "tokens": [_name(token) for token, _, _, _ in known],
        "token_logprobs": [logprob for _, logprob, _, _ in known],
        "top_logprobs": [top for _, _, top, _ in known],
        "text_offset": [offset for _, _, _, offset in known],
    }


def _alternatives(item: PromptToken, num_top: int) -> dict[str, float] | None:
    if item.logprob is None:
        return None
    return {_name(token): logprob for _, token, logprob in item.top[:num_top]} | {_name(item.token): item.logprob}


def prompt_logprobs(prompt: Sequence[PromptToken], num_top: int) -> PromptLogprobs:
    """Return vLLM's form of the log probabilities of a prompt, with `num_top` alternatives for each token."""
    found: PromptLogprobs = []
    for item in prompt:
        if item.logprob is None or item.rank is None:
            found.append(None)
            continue
        ranked = [(token_id, token, logprob, place) for place, (token_id, token, logprob) in enumerate(item.top, 1)]
        entries = [(item.token_id, item.token, item.logprob, item.rank), *ranked[:num_top]]
        found.append(
            {
                str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": token.decode(errors="replace")}
                for token_id, token, logprob, rank in entries
            }
        )
    return found


def _entry(token: bytes, logprob: float) -> Alternative:
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}


def _name(token: bytes) -> str:
    """Return the token as text, or `bytes:\\xe4` for a partial character: these are keys and must differ."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
