"""The OpenAPI document: the responses of each route, errors included. A test compares it with real responses."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from deployments.api import pool_responses, responses
from deployments.api.anthropic_answer import AnthropicErrorAnswer, CountedTokens, MessageObject
from deployments.api.completion_responses import ChatAnswer, TextAnswer
from deployments.api.embeddings import EmbeddingsAnswer
from deployments.api.error_table import RETRIED, STATUSES, reported_errors
from deployments.api.names import NameList, NameShown
from deployments.api.responses_answer import ResponseObject
from deployments.api.tokens import DetokenizeAnswer, TokenizeAnswer
from deployments.json_types import JsonObject

Answers = dict[int | str, JsonObject]

_REF = "#/components/schemas/{model}"
_ERROR = {"$ref": _REF.format(model="ErrorAnswer")}  # a `model` would take the media type of the route's successes
_EVENT = {
    "type": "object",
    "description": "One event: a chunk or typed event as JSON, the error that ended the stream, or `[DONE]`.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_ANYWHERE = (401, 403, 408, 413, 421, 429, 500, 503)


def _describe_statuses() -> dict[int, str]:
    """Return the meaning of each error status, with its codes."""
    meanings: dict[int, dict[str, None]] = {}
    codes: dict[int, set[str]] = {}
    for error in reported_errors():
        assert error.kind is not None
        status, _ = STATUSES[error.kind]
        codes.setdefault(status, set()).add(f"`{error.code}`")
        meanings.setdefault(status, {})[error.kind.value] = None
    for status in RETRIED:
        meanings[status]["`Retry-After` says when to retry."] = None
    return {status: f"{' '.join(meanings[status])} Codes: {', '.join(sorted(codes[status]))}." for status in codes}


_MEANINGS = _describe_statuses()


def answers(*refusals: int, **successes: Any) -> Answers:
    """Return the responses of a route: successes as `s201=Type`, these refusals, and those that any route may give."""
    described: Answers = {int(status[1:]): {"model": model} for status, model in successes.items()}
    for status in sorted({*refusals, *_ANYWHERE}):
        described[status] = {"content": {"application/json": {"schema": _ERROR}}, "description": _MEANINGS[status]}
    return described


def _with_anthropic_errors(described: Answers) -> Answers:
    """Give the refusals Anthropic's shape."""
    schema = {"$ref": _REF.format(model=AnthropicErrorAnswer.__name__)}
    for answer in described.values():
        if "model" not in answer:
            answer["content"] = {"application/json": {"schema": schema}}
    return described


def _also_events(described: Answers) -> Answers:
    """Add server-sent events as a second form of the success, for requests with `stream`."""
    described[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
    described[200]["description"] = "The answer, or its chunks as server-sent events."
    return described


def _answer_text(described: Answers, media_type: str, *statuses: int) -> Answers:
    """Describe these successes as text of that media type."""
    for status in statuses:
        described[status] = {"content": {media_type: {"schema": {"type": "string"}}}, "description": "Done."}
    return described


_CHANGE = (400, 404, 409, 422)  # what a change of the pool may be refused for
_PROMPT = (*_CHANGE, 504)
_PUBLISHED = responses.PublishedAdapter | responses.BatchAnswer
CHAT_ANSWERS = _also_events(answers(*_PROMPT, s200=ChatAnswer))
TEXT_ANSWERS = _also_events(answers(*_PROMPT, s200=TextAnswer))
RESPONSES_ANSWERS = _also_events(answers(*_PROMPT, s200=ResponseObject))
MESSAGES_ANSWERS = _also_events(_with_anthropic_errors(answers(*_PROMPT, s200=MessageObject)))
COUNT_ANSWERS = _with_anthropic_errors(answers(400, 404, 504, s200=CountedTokens))
EMBEDDINGS_ANSWERS = answers(400, 404, 504, s200=EmbeddingsAnswer)
ROUTE_ANSWERS = answers(*_PROMPT, s200=responses.RouteAnswer)
MODELS_ANSWERS = answers(400, s200=pool_responses.ModelList)
MODEL_ANSWERS = answers(400, 404, s200=pool_responses.ModelCard)
NAMES_ANSWERS = answers(400, s200=NameList)
NAME_ANSWERS = answers(400, 404, s200=NameShown)
SETTLED_NAME_ANSWERS = answers(*_CHANGE, s200=responses.SettledAdapter, s202=responses.SettledAdapter)
LORAS_ANSWERS = answers(400, s200=pool_responses.AdapterList)
LORA_ANSWERS = answers(400, 404, s200=pool_responses.AdapterShown)
PUBLISH_ANSWERS = answers(*_CHANGE, s200=_PUBLISHED, s201=_PUBLISHED, s202=_PUBLISHED, s207=responses.BatchAnswer)
WITHDRAW_ANSWERS = answers(404, s200=responses.RemovedAdapters, s202=responses.RemovedAdapters)
ROLLBACK_ANSWERS = answers(*_CHANGE, s201=responses.PublishedAdapter, s202=responses.PublishedAdapter)
_EDITED = responses.PublishedAdapter | responses.SettledAdapter
EDIT_ANSWERS = answers(*_CHANGE, s200=responses.SettledAdapter, s201=responses.PublishedAdapter, s202=_EDITED)
APPROVE_ANSWERS = answers(400, 404, 409, s200=responses.SettledAdapter, s202=responses.SettledAdapter)
SHARE_ANSWERS = answers(*_CHANGE, s200=responses.SettledAdapter, s202=responses.SettledAdapter)
SAMPLES_ANSWERS = answers(
    400, 404, 409, s200=responses.SamplesChanged, s201=responses.SamplesChanged, s202=responses.SamplesChanged
)
OUTCOME_ANSWERS = answers(400, 404, s201=pool_responses.Outcome)
MAP_ANSWERS = answers(400, s200=pool_responses.PoolPicture)
PLACE_ANSWERS = answers(400, 504, s200=pool_responses.PromptPlace)
STATS_ANSWERS = answers(s200=pool_responses.Stats)
USAGE_ANSWERS = answers(400, s200=pool_responses.UsageReport)
LOAD_ANSWERS = _answer_text(answers(*_CHANGE), "text/plain", 200, 202)
UNLOAD_ANSWERS = _answer_text(answers(400, 404), "text/plain", 200, 202)
TOKENIZE_ANSWERS = answers(400, 404, 504, s200=TokenizeAnswer)
DETOKENIZE_ANSWERS = answers(400, 404, 504, s200=DetokenizeAnswer)
LINES_ANSWERS = _answer_text(answers(400), "application/x-ndjson", 200)
DOCTOR_ANSWERS = _answer_text(answers(400, 404), "application/x-ndjson", 200)
EXPORT_ANSWERS = _answer_text(answers(), "application/vnd.apache.parquet", 200)
FILE_ANSWERS = _answer_text(answers(400, 404), "application/octet-stream", 200)
GC_ANSWERS = answers(400, s200=pool_responses.CollectedBlobs)
HEALTH_ANSWERS: Answers = {200: {"model": pool_responses.Health}}
READY_ANSWERS = answers(s200=pool_responses.Ready)


class Api(FastAPI):
    """FastAPI, without the 422 it documents for every route: a malformed request is answered 400 here."""

    def openapi(self) -> JsonObject:
        if self.openapi_schema is None:
            document = super().openapi()
            for operation in [operation for path in document["paths"].values() for operation in path.values()]:
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for error in (responses.ErrorAnswer, responses.ErrorObject, AnthropicErrorAnswer):
                schema = TypeAdapter(error).json_schema(ref_template=_REF)
                schemas[error.__name__] = schema
                schemas[error.__name__].pop("$defs", None)
        assert self.openapi_schema is not None
        return self.openapi_schema
