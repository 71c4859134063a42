"""Error messages for settings: one line for each mistake, with the name of the file and of the setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from deployments.config.parts import ModelSettings
from deployments.field_problems import describe_problem, field_names
from gpu_worker.config import CommonSettings, NativeSettings, VllmSettings

_ENGINES: Mapping[str, type[CommonSettings]] = {"native": NativeSettings, "vllm": VllmSettings}
_OPTIONS = ("host", "port", "metrics_port")


class SettingsInvalid(ValueError):
    """The settings cannot be used. The message has one line for each mistake."""


def settings_error(file: Path | None, model: type[BaseModel], error: ValidationError) -> SettingsInvalid:
    """Describe `error` in lines such as `settings.yaml: worker.max_batch: unknown; did you mean 'max_batch_size'?`."""
    source = "settings" if file is None else str(file)
    lines: dict[str, str] = {}  # by setting: the branches of a union repeat themselves
    for problem in error.errors(include_url=False):
        path = _name_setting(problem)
        shows_value = not _is_secret(model, problem["loc"])
        owner: type[BaseModel] = model
        if problem["loc"][:1] == ("models",) and len(problem["loc"]) > 2:
            owner, problem["loc"] = ModelSettings, problem["loc"][2:]
            path = ".".join([path.split(".")[0], path.split(".")[1], _name_setting(problem)])
        text = _describe_misplaced(model, problem) or describe_problem(
            problem, _find_known(owner, problem["loc"]), shows_value=shows_value
        )
        for number, line in enumerate(text.splitlines()):
            lines.setdefault(f"{path}#{number}", f"{source}: {path}: {line}" if path else f"{source}: {line}")
    return SettingsInvalid("\n".join(lines.values()))


def _name_setting(problem: ErrorDetails) -> str:
    """Return the path of a setting without the names that pydantic gives to the branches of a union."""
    place = problem["loc"]
    names = [str(part) for number, part in enumerate(place) if not (_is_branch(part) or _is_engine(place, number))]
    return ".".join([*names, "engine"] if problem["type"] == "union_tag_invalid" else names)


def _is_branch(part: str | int) -> bool:
    return isinstance(part, str) and "[" in part


def _is_engine(place: tuple[str | int, ...], number: int) -> bool:
    return number == 1 and place[0] == "worker" and place[1] in _ENGINES


def _find_known(model: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """Return the names of the settings that are allowed next to the last part of `place`."""
    if len(place) > 1 and _is_engine(place, 1):
        return [field.name for field in fields(_ENGINES[str(place[1])])]
    return field_names(model, place)


def _describe_misplaced(model: type[BaseModel], problem: ErrorDetails) -> str:
    """Say where an unknown setting belongs, if it is one of another group or engine, or an option of the command."""
    if problem["type"] == "union_tag_invalid":
        return f"must be {' or '.join(map(repr, _ENGINES))}, got {problem['ctx']['tag']!r}"
    if problem["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        return ""
    name, place = str(problem["loc"][-1]), problem["loc"]
    if name in _OPTIONS:
        return f"is an option of the command: serve --{name.replace('_', '-')} {problem['input']}"
    engines = [engine for engine, settings in _ENGINES.items() if name in settings.__dataclass_fields__]
    if len(place) > 1 and _is_engine(place, 1) and engines:
        return f"is a setting of the engine {engines[0]!r}; leave it unset, or set worker.engine to {engines[0]!r}"
    places = [name] if name in model.model_fields else []
    places += ["worker." + name] if engines else []
    groups = [group for group in model.model_fields if group != "models"]  # whose fields the top level has too
    places += [f"{group}.{name}" for group in groups if name in field_names(model, [group, name])]
    return f"unknown here; {' or '.join(dict.fromkeys(places))}?" if places else ""


def _is_secret(model: type[BaseModel], place: tuple[str | int, ...]) -> bool:
    field = model.model_fields.get(str(place[0])) if place else None
    return field is not None and SecretStr in get_args(field.annotation)
