"""The OpenAPI document: the responses of each route, errors included. A test compares it with real responses."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from deployments.api import pool_responses, responses
from deployments.api.completion_responses import ChatAnswer, TextAnswer
from deployments.api.embeddings import EmbeddingsAnswer
from deployments.api.responses_answer import ResponseObject
from deployments.api.tokens import DetokenizeAnswer, TokenizeAnswer
from deployments.json_types import JsonObject

Answers = dict[int | str, JsonObject]

_MEANING = {
    400: "the request breaks a rule; `param` names the field, `code` `unsupported` what this server does not have",
    401: "no key, or one that is not known",
    403: "this client may not do this",
    404: "there is no such model, adapter or version for this caller",
    409: "`plan_gone`: the plan cannot be replayed, a version it pins is not kept any more",
    413: "the body is larger than the server reads",
    421: "The Host header is not a name of this server",
    422: "no adapter matched and the caller wanted no fallback, or adapters drive the model out of range",
    408: "the body came too slowly",
    429: "too many requests of this caller; `Retry-After` says when to retry",
    500: "the server failed",
    503: "a part of the server is overloaded, starting or away; `Retry-After` says when to retry",
    504: "the request's time, `timeout_s` or the server's own limit, was over",
}
_ERROR = {"$ref": "#/components/schemas/ErrorAnswer"}  # a `model` would take the media type of the route's successes
_EVENT = {
    "type": "object",
    "description": "one event of the stream: a chunk or typed event as JSON, the error that broke it off, or `[DONE]`",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_ANYWHERE = (401, 403, 408, 413, 421, 429, 500, 503)


def answers(*refusals: int, **successes: Any) -> Answers:
    """Return the responses of a route: successes as `s201=Type`, these refusals, and those that any route may give."""
    described: Answers = {int(status[1:]): {"model": model} for status, model in successes.items()}
    for status in sorted({*refusals, *_ANYWHERE}):
        described[status] = {"content": {"application/json": {"schema": _ERROR}}, "description": _MEANING[status]}
    return described


def _also_events(described: Answers) -> Answers:
    """Add server-sent events as a second form of the success, for requests with `stream`."""
    described[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
    described[200]["description"] = "the answer, or its chunks as server-sent events up to the last one"
    return described


def _of_kind(described: Answers, media_type: str, *statuses: int) -> Answers:
    """Describe these successes as text of that media type."""
    for status in statuses:
        described[status] = {"content": {media_type: {"schema": {"type": "string"}}}, "description": "done"}
    return described


CHAT_ANSWERS = _also_events(answers(400, 404, 409, 422, 504, s200=ChatAnswer))
TEXT_ANSWERS = _also_events(answers(400, 404, 409, 422, 504, s200=TextAnswer))
RESPONSES_ANSWERS = _also_events(answers(400, 404, 409, 422, 504, s200=ResponseObject))
EMBEDDINGS_ANSWERS = answers(400, 404, 504, s200=EmbeddingsAnswer)
ROUTE_ANSWERS = answers(400, 404, 409, 422, 504, s200=responses.RouteAnswer)
MODELS_ANSWERS = answers(400, s200=pool_responses.ModelList)
MODEL_ANSWERS = answers(400, 404, s200=pool_responses.ModelCard)
LORAS_ANSWERS = answers(400, s200=pool_responses.AdapterList)
LORA_ANSWERS = answers(400, 404, s200=pool_responses.AdapterShown)
PUBLISH_ANSWERS = answers(
    400,
    404,
    409,
    422,
    s200=responses.PublishedAdapter | responses.BatchAnswer,
    s201=responses.PublishedAdapter | responses.BatchAnswer,
    s202=responses.PublishedAdapter | responses.BatchAnswer,
    s207=responses.BatchAnswer,
)
WITHDRAW_ANSWERS = answers(404, s200=responses.RemovedAdapters, s202=responses.RemovedAdapters)
ROLLBACK_ANSWERS = answers(400, 404, 409, 422, s201=responses.PublishedAdapter, s202=responses.PublishedAdapter)
VISIBILITY_ANSWERS = answers(400, 404, 409, s200=responses.SettledAdapter, s202=responses.SettledAdapter)
APPROVE_ANSWERS = answers(400, 404, 409, s200=responses.SettledAdapter, s202=responses.SettledAdapter)
SHARE_ANSWERS = answers(400, 404, 409, 422, s200=responses.SettledAdapter, s202=responses.SettledAdapter)
SAMPLES_ANSWERS = answers(
    400, 404, 409, s200=responses.SamplesChanged, s201=responses.SamplesChanged, s202=responses.SamplesChanged
)
OUTCOME_ANSWERS = answers(400, 404, s201=pool_responses.Outcome)
MAP_ANSWERS = answers(400, s200=pool_responses.PoolPicture)
PLACE_ANSWERS = answers(400, 504, s200=pool_responses.PromptPlace)
STATS_ANSWERS = answers(s200=pool_responses.Stats)
LOAD_ANSWERS = _of_kind(answers(400, 404, 409, 422), "text/plain", 200, 202)
UNLOAD_ANSWERS = _of_kind(answers(400, 404), "text/plain", 200, 202)
TOKENIZE_ANSWERS = answers(400, 404, 504, s200=TokenizeAnswer)
DETOKENIZE_ANSWERS = answers(400, 404, 504, s200=DetokenizeAnswer)
LINES_ANSWERS = _of_kind(answers(400), "application/x-ndjson", 200)
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
            for error in (responses.ErrorAnswer, responses.ErrorObject):
                schema = TypeAdapter(error).json_schema(ref_template="#/components/schemas/{model}")
                schemas[error.__name__] = schema
                schemas[error.__name__].pop("$defs", None)
        assert self.openapi_schema is not None
        return self.openapi_schema
