"""Answers to prompts, in the shape of the OpenAI API, with one `lora` object that says who answered."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

from deployments.api.logprobs import chat_logprobs, text_logprobs
from deployments.api.planned import Planned
from deployments.api.responses import JsonObject, plan_object
from gpu_worker.request.request import Completion, Delta, TokenLogprob
from lora_store import LOCAL_TENANT, MAX_PLAN_ADAPTERS

_DIGEST_CHARS = 12


@dataclass(frozen=True, slots=True)
class Answer:
    """What all parts of one answer share. Choices come prompt by prompt, `num_choices` to each.

    With several prompts every choice carries the `lora` object of its own prompt; with one the answer does.
    Adapters are told by the names `tenant`, who asked, calls them by.
    """

    kind: Literal["chat", "text"]
    model: str
    plans: Sequence[Planned]
    tenant: str = LOCAL_TENANT
    explain: bool = False
    num_choices: int = 1
    tells_logprobs: bool = False
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completions: Sequence[Completion]) -> JsonObject:
        choices = []
        for index, completion in enumerate(completions):
            choice = self._choice(index, completion.finish_reason, completion.logprobs if self.tells_logprobs else None)
            if self.kind == "chat":
                choice["message"] = {"role": "assistant", "content": completion.text}
            else:
                choice["text"] = completion.text
            choices.append(choice | self._own_lora(index))
        return self._object(choices, chunk=False) | {"usage": self._usage(completions)} | self._lora()

    def opening(self) -> JsonObject:
        """The first chunk of a stream: the role of every choice, and the plans before any text."""
        begun: JsonObject = {"delta": {"role": "assistant", "content": ""}} if self.kind == "chat" else {"text": ""}
        indices = range(len(self.plans) * self.num_choices)
        choices = [self._choice(index, None, None) | begun | self._own_lora(index) for index in indices]
        return self._object(choices, chunk=True) | self._lora()

    def chunk(self, index: int, delta: Delta) -> JsonObject:
        choice = self._choice(index, delta.finish_reason, delta.logprobs or None)
        choice |= {"delta": {"content": delta.text}} if self.kind == "chat" else {"text": delta.text}
        return self._object([choice], chunk=True)

    def usage_chunk(self, lasts: Sequence[Delta]) -> JsonObject:
        """`lasts`: the last delta of every choice, in order."""
        return self._object([], chunk=True) | {"usage": self._usage(lasts)}

    def headers(self) -> dict[str, str]:
        """The plans in short, for who reads no body; of several prompts, every adapter once."""
        strategies = dict.fromkeys(planned.plan.strategy for planned in self.plans)
        rows = list(dict.fromkeys(self._adapters_in_short()))
        more = ["..."] if len(rows) > MAX_PLAN_ADAPTERS else []
        return {
            "x-lora-strategy": ", ".join(strategies),
            "x-lora-adapters": ", ".join(rows[:MAX_PLAN_ADAPTERS] + more),
            "x-lora-generation": str(max(planned.plan.generation for planned in self.plans)),
        }

    def _adapters_in_short(self) -> Iterator[str]:
        """`name@digest;weight=0.5`, with the weight where there is one prompt."""
        for planned in self.plans:
            for row in planned.plan.adapters:
                weight = f";weight={row.weight:.6g}" if len(self.plans) == 1 else ""
                yield f"{quote(row.ref.name_for(self.tenant), safe='/')}@{row.ref.digest[:_DIGEST_CHARS]}{weight}"

    def _choice(self, index: int, reason: str | None, logprobs: Sequence[TokenLogprob] | None) -> JsonObject:
        shape = chat_logprobs if self.kind == "chat" else text_logprobs
        told = None if logprobs is None else shape(logprobs)
        return {"index": index, "finish_reason": reason, "logprobs": told}

    def _object(self, choices: list[JsonObject], *, chunk: bool) -> JsonObject:
        prefix, kind = ("chatcmpl", "chat.completion") if self.kind == "chat" else ("cmpl", "text_completion")
        if chunk and self.kind == "chat":
            kind = "chat.completion.chunk"
        identity = {"id": f"{prefix}-{self.request_id}", "object": kind, "created": self.created, "model": self.model}
        return identity | {"choices": choices}

    def _lora(self) -> JsonObject:
        return {"lora": plan_object(self.plans[0], self.tenant, explain=self.explain)} if len(self.plans) == 1 else {}

    def _own_lora(self, index: int) -> JsonObject:
        if len(self.plans) == 1:
            return {}
        return {"lora": plan_object(self.plans[index // self.num_choices], self.tenant, explain=self.explain)}

    def _usage(self, ends: Sequence[Completion] | Sequence[Delta]) -> JsonObject:
        """A prompt counts once however many answers it has, as OpenAI counts."""
        num_prompt = sum(end.num_prompt_tokens for end in ends[:: self.num_choices])
        num_new = sum(end.num_new_tokens for end in ends)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
