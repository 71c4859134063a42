"""The fields of requests, from their models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from deployments.api import base
from deployments.api.anthropic_request import MessagesRequest
from deployments.api.base import LoraOptions
from deployments.api.completions import ChatCompletionRequest, CompletionRequest, RouteQuery
from deployments.api.responses_request import ResponsesRequest
from docs.generate.markdown import code, table

_LINKS = {
    "lora options": "lora-options.md",
    "the server's default": "../how-to/choose-a-base-model.md#sampling-defaults",
    "structured output": "#structured-output",
    "tokens of a prompt": "#tokens-of-a-prompt",
    "see conversations": "../explanation/how-routing-works.md#conversations",
    "how to use tools": "../how-to/tools.md",
    "see model names": "../how-to/model-names.md",
    "see contracts": "../how-to/contracts.md",
    "see strategies": "../explanation/strategies.md#weights",
    "when `auto` abstains": "../explanation/when-auto-abstains.md",
}
_WITHOUT_EFFECT = "Accepted without effect"
_SIGNS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
}


def chat_fields() -> str:
    """Return the fields of `POST /v1/chat/completions`."""
    return _fields(ChatCompletionRequest)


def completion_fields() -> str:
    """Return how the fields of `POST /v1/completions` differ from those of chats."""
    absent = ChatCompletionRequest.model_fields.keys() - CompletionRequest.model_fields.keys()
    text = f"The fields of chats, without {', '.join(map(code, sorted(absent)))}, and these:\n\n"
    return text + _fields(CompletionRequest, unlike=ChatCompletionRequest)


def responses_fields() -> str:
    """Return the fields of `POST /v1/responses` that chats do not have, or have in another form."""
    return _fields(ResponsesRequest, unlike=ChatCompletionRequest)


def messages_fields() -> str:
    """Return the fields of `POST /v1/messages` that chats do not have, or have in another form."""
    return _fields(MessagesRequest, unlike=ChatCompletionRequest)


def route_fields() -> str:
    """Return the fields of `POST /v1/route`."""
    return _fields(RouteQuery)


def lora_fields() -> str:
    """Return the fields of the `lora` object."""
    return _fields(LoraOptions)


def refused_fields() -> str:
    """Return the fields of the OpenAI API and of other servers that are refused, with the values that pass."""
    routes = {
        "chat": base.NOT_SERVED_IN_CHAT,
        "completions": base.NOT_SERVED_IN_COMPLETIONS,
        "responses": base.NOT_SERVED_IN_RESPONSES,
        "`/v1/messages`": base.NOT_SERVED_IN_ANTHROPIC,
    }
    by_field: dict[tuple[str, str], list[str]] = {}
    for route, refused in routes.items():
        for name, values in refused.items():
            by_field.setdefault((name, _passing(values)), []).append(route)
    rows = [
        *[(code(name), ", ".join(where), passing) for (name, passing), where in by_field.items()],
        *_refused("a message", base.NOT_SERVED_IN_MESSAGES),
        *_refused("`structured_outputs`", base.NOT_SERVED_IN_STRUCTURED),
    ]
    named = (base.ROLES, base.PARTS, base.ITEMS, base.INPUT_PARTS)
    roles, parts, items, input_parts = (", ".join(map(code, names)) for names in named)
    text = (
        f"\nMessages of the roles {roles} and content parts of the types {parts} are refused as well, and in responses "
        f"items of the types {items} and parts of the types {input_parts}.\n"
    )
    return table(("field", "in", "values that pass"), rows) + text


def _refused(where: str, fields: Mapping[str, tuple[Any, ...]]) -> list[tuple[str, str, str]]:
    return [(code(name), where, _passing(values)) for name, values in fields.items()]


def _passing(values: tuple[Any, ...]) -> str:
    return ", ".join(code(_json(value)) for value in values)


def _json(value: Any) -> str:
    return json.dumps(value)


def _fields(model: type[BaseModel], *, unlike: type[BaseModel] | None = None) -> str:
    """Return one row per field. `unlike`: leave out the fields that another model has with the same meaning."""
    schema, others = model.model_json_schema(), {} if unlike is None else unlike.model_json_schema()["properties"]
    rows = []
    for name, field in schema["properties"].items():
        meaning = " ".join(field["description"].split())
        if name in others and others[name]["description"] == field["description"]:
            continue
        status = "ignored" if meaning.startswith(_WITHOUT_EFFECT) else "served"
        rows.append((code(name), status, _default(name, field, schema), _range(field, schema), _with_links(meaning)))
    return table(("field", "status", "default", "range", "meaning"), rows)


def _with_links(text: str) -> str:
    """Link the pages that a text refers to. The API's own schema has no links."""
    for phrase, target in _LINKS.items():
        name = phrase.removeprefix("see ")
        text = text.replace(phrase, phrase.replace(name, f"[{name}]({target})"))
    return text


def _default(name: str, field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if name in schema.get("required", ()):
        return "required"
    default = field.get("default")
    return "" if default is None or default in ([], {}) or isinstance(default, dict) else code(_json(default))


def _range(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    options = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
    return " or ".join(dict.fromkeys(filter(None, map(_bounds, options))))


def _bounds(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(code(str(value)) for value in field["enum"])
    texts = [f"{sign} {field[key]}" for key, sign in _SIGNS.items() if key in field]
    for low, high, unit in (("minLength", "maxLength", "characters"), ("minItems", "maxItems", "items")):
        if high in field:
            texts.append(f"{field.get(low, 0)} to {field[high]:,} {unit}")
    return ", ".join(texts)
