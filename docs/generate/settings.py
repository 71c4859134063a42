"""The settings, from the JSON schema of their models: allowed values, defaults, and the text under each field."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from deployments.config.app import AppConfig
from deployments.config.parts import ModelSettings
from deployments.scaling.settings import ServeOptions
from docs.generate.markdown import code, table
from gpu_worker.config import CommonSettings, NativeSettings, VllmSettings

ENGINES: tuple[type[CommonSettings], ...] = (NativeSettings, VllmSettings)
_HEAD = ("setting", "allowed", "default", "meaning")


@cache
def find_schema() -> Mapping[str, Any]:
    """Return the JSON schema of a settings file, in which each setting has its description on one line."""
    schema = AppConfig.model_json_schema()
    for engine in ENGINES:
        properties = schema["$defs"][engine.__name__]["properties"]
        for name, text in find_meanings(engine).items():
            properties[name]["description"] = text
    for part in (schema, schema["$defs"][ModelSettings.__name__]):
        worker = part["properties"]["worker"]
        worker["anyOf"] = worker.pop("oneOf")  # a group that names no engine is one of both
    for part in (schema, *schema["$defs"].values()):
        for field in part.get("properties", {}).values():
            if "description" in field:
                field["description"] = " ".join(field["description"].split())
    return schema


def find_meanings(model: type) -> dict[str, str]:
    """Return the text under each field of a model. Pydantic leaves out those of a dataclass's parents."""
    parents = [parent for parent in reversed(model.__mro__) if parent is model or is_dataclass(parent)]
    found = {}
    for parent in parents:
        for name, field in TypeAdapter(parent).json_schema()["properties"].items():
            if "description" in field:
                found[name] = " ".join(field["description"].split())
    return found


def settings() -> str:
    """Return a table for the top level and one for each group of settings."""
    schema = find_schema()
    groups = {name: _find_group(name, schema) for name in schema["properties"]}
    single = [name for name, group in groups.items() if group is None]
    parts = ["### Top level\n\n" + _table(schema, single)]
    for name, group in groups.items():
        if name == "worker":
            parts += _describe_worker(schema)
        elif group is not None:
            model = type(AppConfig.model_fields[name].default)
            parts.append(f"### {code(name)}\n\n{_purpose(model)}\n\n{_table(group, list(group['properties']))}")
    parts.append(_describe_options())
    return "\n".join(parts)


def _describe_worker(schema: Mapping[str, Any]) -> list[str]:
    """Return a table of the settings of both engines, and one of each engine's own."""
    native, vllm = (schema["$defs"][engine.__name__] for engine in ENGINES)
    common = [name for name in native["properties"] if name in vllm["properties"] and name != "engine"]
    texts = [code(str(part["properties"]["engine"]["const"])) + ": " + part["properties"]["engine"]["description"]
             for part in (native, vllm)]  # fmt: skip
    row = (code("engine"), "`native`, `vllm`", "native", " ".join(texts))
    parts = [f"### `worker`\n\n{_purpose(CommonSettings)}\n\n{_table(native, common, [row])}"]
    for part in (native, vllm):
        own = [name for name in part["properties"] if name not in (*common, "engine")]
        parts.append(f"### `worker` with `engine: {part['properties']['engine']['const']}`\n\n{_table(part, own)}")
    return parts


def _describe_options() -> str:
    """Return the defaults of Serve's options, which its own documentation describes."""
    rows = [
        (code(name), code(json.dumps(to_jsonable_python(field.default))))
        for name, field in AppConfig.model_fields.items()
        if isinstance(field.default, ServeOptions)
    ]
    text = (
        "Each group takes the options of Serve's [deployments](https://docs.ray.io/en/latest/serve/configure-serve-deployment.html)"
        " under Serve's names, and a group changes only what it names. `num_replicas` is a fixed number;"
        " `autoscaling_config` is a range, and replaces it."
    )
    return f"### Serve's options\n\n{text} {_purpose(ServeOptions)}\n\n{table(('group', 'default'), rows)}"


def _purpose(model: type) -> str:
    """Return the first lines of a class's documentation, without what it raises."""
    return textwrap.dedent(inspect.getdoc(model) or "").split(" Raises:")[0].strip()


def _table(part: Mapping[str, Any], names: Iterable[str], rows: Iterable[tuple[str, ...]] = ()) -> str:
    """Return a table of the named settings after `rows`. Raises: KeyError for a setting without a text."""
    schema, found = find_schema(), part["properties"]
    own = [(code(name), _allowed(found[name], schema), _default(name, found[name]), found[name]["description"])
           for name in names]  # fmt: skip
    return table(_HEAD, [*rows, *own])


def _find_group(name: str, schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the schema of a group's settings; None for a single setting, as Serve's options are."""
    field = schema["properties"][name]
    if name == "worker":  # the settings of one of the engines
        return field
    reference = _reference(field)
    part = None if reference is None else schema["$defs"][reference]
    return part if part is not None and "properties" in part else None


def _reference(field: Mapping[str, Any]) -> str | None:
    """Return the name of the model that a field holds, where it holds one."""
    found = field.get("$ref") or next((item["$ref"] for item in field.get("allOf", ()) if "$ref" in item), None)
    return None if found is None else str(found).rpartition("/")[2]


def _allowed(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if options := field.get("anyOf"):
        return " or ".join(dict.fromkeys(_allowed(option, schema) for option in options))
    if _reference(field) == ModelSettings.__name__:
        return "base models"
    if "$ref" in field:
        return "[Serve's options](#serves-options)"
    if "enum" in field:
        return ", ".join(code(str(value)) for value in field["enum"])
    if "const" in field:
        return code(str(field["const"]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        kind = f"list of {_allowed(field.get('items', {}), schema)}"
    elif kind == "object" and isinstance(values := field.get("additionalProperties"), dict):
        kind = f"mapping of name to {_allowed(values, schema)}"
    kind = {"null": "unset", "string": "text", "boolean": "`true`, `false`"}.get(kind, kind)
    bounds = _bounds(field)
    return f"{kind}, {bounds}" if bounds else kind


def _bounds(field: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join(f"{sign} {_plain(field[key])}" for key, sign in signs.items() if key in field)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _default(name: str, field: Mapping[str, Any]) -> str:
    """Return a default as YAML writes it, with the home folder as `~`."""
    value = field.get("default")
    if "$ref" in field:
        return "see below"
    if value is None or value in ([], {}, ""):
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value} ({value >> 20} MiB)"
    return f"{value:g}" if isinstance(value, float) else str(value).replace(str(Path.home()), "~")
