"""Files about the settings: the commented example, and the JSON schema for editors."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from deployments.config.app import AppConfig
from deployments.scaling.settings import ServeOptions
from docs.generate.settings import find_meanings, find_schema
from gpu_worker.config import CommonSettings, VllmSettings

CHART_VALUES = Path(__file__).parent.parent.parent / "k8s" / "helm" / "loraretriever" / "values.yaml"
_WIDTH = 116
_HEAD = """\
# yaml-language-server: $schema=../docs/reference/settings.schema.json
# Every setting of `loraretriever serve --config FILE` with its default. Lines with ## explain the line below them.
# Remove the # before a setting to change it, and the # before its group.
"""


def example() -> str:
    """Return all settings as comments of a YAML file."""
    lines = [_HEAD.rstrip()]
    for name, field in AppConfig.model_fields.items():
        inner = _find_fields(field.default)
        lines.append("")
        if inner is None:
            lines += _setting(name, field.default, find_meanings(AppConfig)[name], "")
        else:
            lines.append(f"# {name}:")
            meanings = find_meanings(type(field.default))
            for setting, value in inner.items():
                lines += _setting(setting, value, meanings[setting], "  ")
        if name == "worker":
            lines += _vllm()
    return "\n".join(lines) + "\n"


def schema() -> str:
    """Return the JSON schema of a settings file, with the meaning of each setting."""
    return json.dumps(_portable(find_schema()), indent=2, ensure_ascii=False) + "\n"


def chart_schema() -> str:
    """Return the JSON schema of the Helm chart's values, which has that of the settings inside."""
    settings = _portable(find_schema())
    definitions = settings.pop("$defs")
    values = yaml.safe_load(CHART_VALUES.read_text(encoding="utf-8"))
    properties = {name: settings if name == "settings" else _make_schema(value) for name, value in values.items()}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "additionalProperties": False}
    return json.dumps(head | {"properties": properties, "$defs": definitions}, indent=2, ensure_ascii=False) + "\n"


def _make_schema(value: object) -> dict[str, Any]:
    """Return the JSON schema of values of the type of this one. An empty mapping takes any fields."""
    if isinstance(value, dict):
        fields_of_value = {name: _make_schema(inner) for name, inner in value.items()}
        return {"type": "object"} | ({"properties": fields_of_value, "additionalProperties": False} if value else {})
    return {"type": {bool: "boolean", str: "string", list: "array"}[type(value)]}


def _vllm() -> Iterator[str]:
    """Yield what `engine: vllm` has besides the settings of both engines."""
    yield "##   With `engine: vllm`, without the settings of the engine `native`; to set one of these, remove its ##:"
    both, meanings = find_meanings(CommonSettings), find_meanings(VllmSettings)
    for field in fields(VllmSettings):
        if field.name not in both and field.name != "engine":
            yield from (f"#{line}" for line in _setting(field.name, field.default, meanings[field.name], "  "))


def _find_fields(value: object) -> dict[str, Any] | None:
    """Return the settings of a group by name, None for a single setting."""
    if isinstance(value, BaseModel) and not isinstance(value, ServeOptions):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _setting(name: str, value: object, meaning: str, indent: str) -> Iterator[str]:
    yield from (f"## {indent}{line}" for line in textwrap.wrap(meaning, _WIDTH - len(indent)))
    shown = json.dumps(_portable(to_jsonable_python(value)), ensure_ascii=False)  # JSON is YAML too
    yield f"# {indent}{name}: {shown}"


def _portable(value: Any) -> Any:
    """Return the value with `~` for this user's home folder."""
    if isinstance(value, str):
        return value.replace(str(Path.home()), "~")
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    return [_portable(item) for item in value] if isinstance(value, list) else value
