"""Answers to prompts in the shape of the OpenAI API, with a `lora` object that names the adapters that answered."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired
from urllib.parse import quote

from typing_extensions import TypedDict

from deployments.api.logprobs import (
    ChatLogprobs,
    PromptLogprobs,
    TextLogprobs,
    chat_logprobs,
    prompt_logprobs,
    text_logprobs,
)
from deployments.api.responses import Planned, PlannedRow, PlanObject, RoutedCandidate, SampleRow, candidate_rows
from deployments.json_types import JsonMapping, JsonObject
from gpu_worker.front.request.request import Completion, Delta, FinishReason, PromptToken, TokenLogprob
from gpu_worker.front.request.tools import ToolCallPiece
from lora_store import LOCAL_TENANT, MAX_PLAN_ADAPTERS
from retriever_svc import Candidate
from retriever_svc.calibration import NO_THRESHOLD

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


class CalledFunctionObject(TypedDict):
    """`arguments`: a JSON object as text."""

    name: str
    arguments: str


class ToolCallObject(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunctionObject


class AnswerMessage(TypedDict):
    """`content` is null if the answer has only calls."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[ToolCallObject]]


class ChatChoice(TypedDict):
    """`stop_reason`: the stop string that ended the answer, if one did."""

    index: int
    finish_reason: FinishReason
    stop_reason: NotRequired[str]
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

    @property
    def has_logprobs(self) -> bool:
        """Return whether the answer reports log probabilities, of its own tokens or of its prompt's."""
        return self.num_logprobs is not None or self.num_prompt_logprobs is not None

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
        for chosen, completion in zip(choices, completions, strict=True):
            if completion.stop is not None:
                chosen["stop_reason"] = completion.stop
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
        choices = [{"index": index, "finish_reason": None, "logprobs": None} | begun for index in indices]
        if len(self.plans) == 1:
            return self._chunk(choices) | {"lora": self._plan_of(0)}
        return self._chunk([choice | {"lora": self._plan_of(index)} for index, choice in enumerate(choices)])

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
        if self.kind == "chat" and delta.stop is not None:
            choice["stop_reason"] = delta.stop
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
        policy = self.plans[0].policy
        named = {} if policy is None else {"x-lora-policy": policy}
        return (
            named
            | {
                "x-lora-strategy": ", ".join(strategies),
                "x-lora-adapters": ", ".join(rows[:MAX_PLAN_ADAPTERS] + more),
                "x-lora-generation": str(max(planned.plan.generation for planned in self.plans)),
            }
            | ({"x-lora-reason": ", ".join(reasons), **self._why_in_short()} if reasons else {})
        )

    def _why_in_short(self) -> dict[str, str]:
        """Return the header that explains the choice for a single prompt, in printable ASCII."""
        if len(self.plans) > 1:
            return {}
        said = why(self.plans[0], self.tenant)
        return {"x-lora-why": "".join(char if " " <= char <= "~" else "?" for char in said)}

    def _adapters_in_short(self) -> Iterator[str]:
        """Yield `name@digest;weight=0.5`; the weight only if there is one prompt."""
        for planned in self.plans:
            for row in planned.plan.adapters:
                weight = f";weight={row.weight:.6g}" if len(self.plans) == 1 else ""
                yield f"{quote(row.ref.name_for(self.tenant), safe='/')}@{row.ref.short_digest}{weight}"

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


def split_calls(delta: JsonMapping) -> tuple[list[JsonMapping], list[JsonMapping]]:
    """Return the end of a call that an earlier chunk began, and the calls that this chunk begins.

    A chunk has what one interval released. Its text comes after the former and before the latter.
    """
    calls = delta.get("tool_calls") or ()
    return [call for call in calls if "id" not in call], [call for call in calls if "id" in call]


def plan_object(planned: Planned, tenant: str, *, explain: bool) -> PlanObject:
    """Return strategy and adapters; with `explain` also the generation, every candidate, and why it was chosen or not.

    Adapters have the names that `tenant` uses for them.
    """
    plan = planned.plan
    adapters: list[PlannedRow] = [
        {"name": row.ref.name_for(tenant), "digest": row.ref.digest, "weight": row.weight, "score": row.score}
        for row in plan.adapters
    ]
    report: PlanObject = {"strategy": plan.strategy, "adapters": adapters, "abstained": planned.abstained}
    if plan.base_model:
        report["base_model"] = plan.base_model
    if explain:
        report["generation"] = plan.generation
        report["candidates"] = [_routed_candidate(candidate, tenant) for candidate in planned.candidates]
        if planned.reason is not None:
            report["reason"], report["why"] = planned.reason, why(planned, tenant)
        if planned.policy is not None:
            report["policy"] = planned.policy
        if planned.contract is not None:
            report["contract"] = {
                "adapter": planned.contract.adapter.name_for(tenant),
                "applied": list(planned.contract.parts),
            }
    return report


def why(planned: Planned, tenant: str) -> str:
    """Return the reason of a choice in a sentence or two, with what would have changed it."""
    said = [
        f"Outcomes of nearly the same prompts speak {'for' if candidate.outcome > 0 else 'against'}"
        f" {candidate.ref.name_for(tenant)}."
        for candidate in planned.candidates
        if candidate.outcome
    ]
    return " ".join([_why_chosen(planned, tenant), *said])


def _why_chosen(planned: Planned, tenant: str) -> str:
    if planned.reason == "housekeeping":
        return "The prompt is the client's own, such as a request for a title, so the base model answers."
    if not planned.candidates:
        tags = " and ".join(map(repr, planned.tags))
        tagged = f" and the {'tag' if len(planned.tags) == 1 else 'tags'} {tags}" if tags else ""
        return f"The pool has no adapter with samples{tagged} that this request may use, so the base model answers."
    best = _decisive(planned)
    name, needs = best.ref.name_for(tenant), f"scores {best.score:.3f} and needs {best.threshold:.3f}"
    if best.threshold <= NO_THRESHOLD:
        nearest = f"{name} is the nearest, with a score of {best.score:.3f}."
        return f"No adapter fits, so the base model answers. {nearest}" if planned.abstained else nearest
    if best.outcome < 0:
        return "No adapter fits, so the base model answers."
    if planned.reason == "below_threshold":
        said = f"No adapter fits, so the base model answers. {name} comes nearest: it {needs}."
        if any(item.score > best.score for item in planned.candidates if item.outcome >= 0):
            return said  # with one threshold for all, another one would lead
        return f"{said} lora.min_score {math.floor(best.score * 1000) / 1000:.3f} would choose it."
    fits = f"{name} fits: it {needs}, and is right with a probability of about {best.confidence:.0%}."
    nearer = max((item for item in planned.candidates if item.outcome >= 0), key=lambda item: item.score)
    if nearer.score <= best.score or nearer.score < nearer.threshold:
        return fits
    lead = f"{nearer.ref.name_for(tenant)} scores {nearer.score:.3f}, which is not clearly better"
    return f"{fits} It answered the previous turn and stays: {lead}."


def _decisive(planned: Planned) -> Candidate:
    """Return the candidate that leads the plan; if none does, the one that lacks least."""
    found_as = {arm.answering: arm.version.live for arm in planned.trials}  # only live versions are candidates
    leaders = {found_as.get(row.ref, row.ref) for row in planned.plan.adapters[:1]}
    chosen = (candidate for candidate in planned.candidates if candidate.ref in leaders)
    lacks_least = max(planned.candidates, key=lambda item: (item.outcome >= 0, item.score - item.threshold))
    return next(chosen, lacks_least)


def _routed_candidate(candidate: Candidate, tenant: str) -> RoutedCandidate:
    [row] = candidate_rows([candidate], tenant)
    samples: list[SampleRow] = [{"input": sample.text, "score": sample.score} for sample in candidate.samples]
    shown: RoutedCandidate = {
        "name": row["name"],
        "digest": row["digest"],
        "score": row["score"],
        "threshold": candidate.threshold,
        "confidence": candidate.confidence,
    }
    if candidate.outcome:
        shown["outcome"] = candidate.outcome
    return {**shown, "samples": samples} if samples else shown
