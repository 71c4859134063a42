"""Files about the settings: the commented example, and the JSON schema for editors."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from deployments.config.app import AppConfig
from docs.generate.settings import meanings_of

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
        inner = _fields_of(field.default)
        lines.append("")
        if inner is None:
            lines += _setting(name, field.default, meanings_of(AppConfig)[name], "")
        else:
            lines.append(f"# {name}:")
            meanings = meanings_of(type(field.default))
            for setting, value in inner.items():
                lines += _setting(setting, value, meanings[setting], "  ")
    return "\n".join(lines) + "\n"


def schema() -> str:
    """Return the JSON schema of a settings file, with the meaning of each setting."""
    found = AppConfig.model_json_schema()
    models = {"AppConfig": AppConfig} | {
        type(field.default).__name__: type(field.default)
        for field in AppConfig.model_fields.values()
        if _fields_of(field.default) is not None
    }
    for name, model in models.items():
        part = found if model is AppConfig else found["$defs"][name]
        for setting, meaning in meanings_of(model).items():
            part["properties"][setting].setdefault("description", meaning)
    return json.dumps(_portable(found), indent=2, ensure_ascii=False) + "\n"


def _fields_of(value: object) -> dict[str, Any] | None:
    """Return the settings of a group by name, None for a single setting."""
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _setting(name: str, value: object, meaning: str, indent: str) -> Iterator[str]:
    yield from (f"## {indent}{line}" for line in textwrap.wrap(meaning, _WIDTH - len(indent)))
    shown = json.dumps(_portable(to_jsonable_python(value)), ensure_ascii=False)  # JSON is YAML too
    yield f"# {indent}{name}: {shown}"


def _portable(value: Any) -> Any:
    """Return the value with `~` in place of this user's home folder."""
    if isinstance(value, str):
        return value.replace(str(Path.home()), "~")
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    return [_portable(item) for item in value] if isinstance(value, list) else value
