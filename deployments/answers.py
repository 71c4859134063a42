"""Response objects, in the shape of the OpenAI API, with one `lora` object that says who answered."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.planner import Planned
from deployments.publisher import Published
from gpu_worker.request import Completion, Delta
from lora_store import AdapterRecord
from retriever_svc import Candidate

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What all parts of one answer share."""

    kind: Literal["chat", "text"]
    model: str
    planned: Planned
    explain: bool
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completion: Completion) -> JsonObject:
        choice: JsonObject = {"index": 0, "finish_reason": completion.finish_reason, "logprobs": None}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": completion.text}
        else:
            choice["text"] = completion.text
        usage = usage_object(completion.num_prompt_tokens, completion.num_new_tokens)
        return self._object([choice], chunk=False) | {"usage": usage, "lora": self._lora()}

    def opening(self) -> JsonObject:
        """The first chunk of a stream: the role, and the plan before any text."""
        choice: JsonObject = {"index": 0, "finish_reason": None, "logprobs": None}
        choice |= {"delta": {"role": "assistant", "content": ""}} if self.kind == "chat" else {"text": ""}
        return self._object([choice], chunk=True) | {"lora": self._lora()}

    def chunk(self, delta: Delta) -> JsonObject:
        choice: JsonObject = {"index": 0, "finish_reason": delta.finish_reason, "logprobs": None}
        choice |= {"delta": {"content": delta.text}} if self.kind == "chat" else {"text": delta.text}
        return self._object([choice], chunk=True)

    def usage_chunk(self, last: Delta) -> JsonObject:
        return self._object([], chunk=True) | {"usage": usage_object(last.num_prompt_tokens, last.num_new_tokens)}

    def _object(self, choices: list[JsonObject], *, chunk: bool) -> JsonObject:
        prefix, kind = ("chatcmpl", "chat.completion") if self.kind == "chat" else ("cmpl", "text_completion")
        if chunk and self.kind == "chat":
            kind = "chat.completion.chunk"
        identity = {"id": f"{prefix}-{self.request_id}", "object": kind, "created": self.created, "model": self.model}
        return identity | {"choices": choices}

    def _lora(self) -> JsonObject:
        return plan_object(self.planned, explain=self.explain)


def usage_object(num_prompt_tokens: int, num_new_tokens: int) -> JsonObject:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }


def plan_object(planned: Planned, *, explain: bool) -> JsonObject:
    """Strategy and adapters always; every candidate and its score where the client asked."""
    plan = planned.plan
    adapters = [
        {"name": row.ref.name, "digest": row.ref.digest, "weight": row.weight, "score": row.score}
        for row in plan.adapters
    ]
    report: JsonObject = {"strategy": plan.strategy, "adapters": adapters, "abstained": planned.abstained}
    if explain:
        report |= {"generation": plan.generation, "candidates": candidate_objects(planned.candidates)}
    return report


def candidate_objects(candidates: Sequence[Candidate]) -> list[JsonObject]:
    return [{"name": c.ref.name, "digest": c.ref.digest, "score": c.score} for c in candidates]


def model_objects(base: str, records: Sequence[AdapterRecord]) -> list[JsonObject]:
    """`auto`, the base model, then every adapter, as model cards."""
    cards = [_card("auto", base, 0), _card(base, None, 0)]
    return cards + [_card(r.ref.name, base, int(r.created_at.timestamp()), root=r.source) for r in records]


def _card(name: str, parent: str | None, created: int, root: str | None = None) -> JsonObject:
    card: JsonObject = {"id": name, "object": "model", "created": created, "owned_by": "loraretriever"}
    return card | {"root": root or name, "parent": parent}


def lora_object(record: AdapterRecord) -> JsonObject:
    """One adapter of the pool."""
    return {
        "name": record.ref.name,
        "tenant": record.ref.tenant,
        "digest": record.ref.digest,
        "visibility": record.visibility,
        "tags": list(record.tags),
        "base_model": record.base_model,
        "ranks": list(record.ranks),
        "target_modules": list(record.target_modules),
        "num_bytes": record.num_bytes,
        "num_samples": record.num_samples,
        "template": record.template,
        "found_by_auto": record.encoder is not None,
        "probe_shift": record.probe_shift,
        "source": record.source,
        "created_at": record.created_at.isoformat(),
        "generation": record.generation,
    }


def published_object(published: Published) -> JsonObject:
    return {
        "name": published.ref.name,
        "digest": published.ref.digest,
        "generation": published.generation,
        "replicas": {"ready": published.ready, "behind": published.behind},
        "found_by_auto": published.found_by_auto,
        "probe_shift": published.probe_shift,
        "neighbours": candidate_objects(published.neighbours),
    }
