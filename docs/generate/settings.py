"""The settings, from their models: allowed values and defaults from the schema, meanings from the source's comments."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from deployments.config.app import AppConfig, RetrievalSettings, SamplingDefaults, WorkerSettings
from deployments.scaling.settings import ScalingSettings
from docs.generate.markdown import code, table
from docs.generate.texts import load
from lora_store import Limits

_KINDS: Mapping[type, str] = {
    AppConfig: "top",
    WorkerSettings: "worker",
    RetrievalSettings: "retrieval",
    SamplingDefaults: "sampling_defaults",
    ScalingSettings: "scaling",
    Limits: "admission",
}
_HEAD = ("setting", "allowed", "default", "meaning")


def settings() -> str:
    """Return a table for the top level and one for each group of settings."""
    schema = AppConfig.model_json_schema()
    groups: dict[str, list[str]] = {}
    top = []
    for name in AppConfig.model_fields:
        reference = _reference(schema["properties"][name])
        if reference is None:
            top.append(name)
        else:
            groups.setdefault(reference, []).append(name)
    parts = ["### Top level\n\n" + _table(AppConfig, schema, top, schema)]
    for names in groups.values():
        model = AppConfig.model_fields[names[0]].annotation
        assert model is not None
        part = schema["$defs"][_reference(schema["properties"][names[0]])]
        title = ", ".join(map(code, names))
        text = textwrap.dedent(inspect.getdoc(model) or "").strip()
        rows = _table(model, part, list(part["properties"]), schema)
        parts.append(f"### {title}\n\n{text}\n\n{rows}{_changed(names)}")
    return "\n".join(parts)


def _changed(names: list[str]) -> str:
    """Return the defaults in which the groups that share one model differ from it."""
    lines = []
    for name in names:
        default = AppConfig.model_fields[name].default
        given = {field: getattr(default, field) for field in getattr(default, "model_fields_set", ())}
        if given:
            said = ", ".join(f"`{field}: {_shown(value)}`" for field, value in sorted(given.items()))
            lines.append(f"- Defaults of `{name}` that differ from the table: {said}.")
    note = "\nA group in the settings file changes only the settings that it names.\n" if lines else ""
    return ("\n" + "\n".join(lines) + "\n" if lines else "") + note


def _table(model: type, part: Mapping[str, Any], names: list[str], schema: Mapping[str, Any]) -> str:
    meanings = meanings_of(model)
    properties = part["properties"]
    rows = [
        (
            code(name),
            _allowed(properties[name], schema),
            _default(properties[name], name in part.get("required", ())),
            meanings[name],
        )
        for name in names
    ]
    return table(_HEAD, rows)


def meanings_of(model: type) -> dict[str, str]:
    """Return the meaning of each setting that is not a group: a description, comments in the source, or a text.

    Raises: KeyError for a setting without any.
    """
    comments, texts = comments_of(model), load("settings")[_KINDS[model]]
    described = TypeAdapter(model).json_schema()["properties"]
    single = {name: field for name, field in described.items() if _reference(field) is None}
    return {name: field.get("description") or comments.get(name) or texts[name] for name, field in single.items()}


def comments_of(model: type) -> dict[str, str]:
    """Return the comment of each field: at the end of its line, and on the lines above it."""
    found: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        if parent.__module__.split(".")[0] in ("deployments", "gpu_worker", "lora_store"):
            found |= _comments_in(textwrap.dedent(inspect.getsource(parent)))
    return found


def _comments_in(source: str) -> dict[str, str]:
    tokens = [
        token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
    ]
    by_line = {token.start[0]: (token.string.lstrip("# ").strip(), _stands_alone(token)) for token in tokens}
    [body] = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = [*_above(node.lineno, by_line), *_beside(node, by_line)]
            if lines:
                found[node.target.id] = " ".join(lines)
    return found


def _stands_alone(token: tokenize.TokenInfo) -> bool:
    return token.line.strip().startswith("#")


def _above(line: int, by_line: Mapping[int, tuple[str, bool]]) -> list[str]:
    texts: list[str] = []
    while (line := line - 1) in by_line and by_line[line][1]:
        texts.insert(0, by_line[line][0])
    return texts


def _beside(node: ast.AnnAssign, by_line: Mapping[int, tuple[str, bool]]) -> Iterator[str]:
    for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
        if line in by_line and not by_line[line][1]:
            yield by_line[line][0]


def _reference(field: Mapping[str, Any]) -> str | None:
    """Return the name of the model that a field holds, where it holds one."""
    found = field.get("$ref") or next((item["$ref"] for item in field.get("allOf", ()) if "$ref" in item), None)
    return None if found is None else str(found).rpartition("/")[2]


def _allowed(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if options := field.get("anyOf"):
        return " or ".join(dict.fromkeys(_allowed(option, schema) for option in options))
    if "$ref" in field:
        return _allowed(schema["$defs"][_reference(field)], schema)
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


def _default(field: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    return _shown(field.get("default"))


def _shown(value: Any) -> str:
    """Return a default as YAML writes it, with the home folder as `~`."""
    if value is None or value in ([], {}, ""):
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value} ({value >> 20} MiB)"
    return f"{value:g}" if isinstance(value, float) else str(value).replace(str(Path.home()), "~")
