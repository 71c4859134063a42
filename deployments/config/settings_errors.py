"""Error messages for settings: one line for each mistake, with the name of the file and of the setting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from deployments.field_problems import describe_problem, field_names
from deployments.json_types import JsonMapping

RENAMED_SETTINGS: Mapping[str, str] = {
    "admins_approve_own": "allow_self_approval",
    "max_in_flight": "max_concurrent_requests",
    "wake_timeout_s": "scale_from_zero_timeout_s",
    "worker.wedged_after_s": "worker.step_timeout_s",
}
"""Settings of earlier versions, by their old names. Old names are refused."""


_OPTIONS = ("host", "port", "metrics_port")


class SettingsInvalid(ValueError):
    """The settings cannot be used. The message has one line for each mistake."""


def refuse_renamed(settings: JsonMapping) -> None:
    """Raise ValueError where `settings` has names of earlier versions, naming each new one."""
    found = [f"{old}: renamed to {new}" for old, new in RENAMED_SETTINGS.items() if _has(settings, old.split("."))]
    if found:
        raise ValueError("\n".join(found))


def settings_error(file: Path | None, model: type[BaseModel], error: ValidationError) -> SettingsInvalid:
    """Describe `error` in lines such as `settings.yaml: worker.max_batch: unknown; did you mean 'max_batch_size'?`."""
    source = "settings" if file is None else str(file)
    lines: dict[str, str] = {}  # by setting: the branches of a union repeat themselves
    for problem in error.errors(include_url=False):
        path = _setting_of(problem["loc"])
        shows_value = not _is_secret(model, problem["loc"])
        text = _describe_misplaced(model, problem) or describe_problem(
            problem, field_names(model, problem["loc"]), shows_value=shows_value
        )
        for number, line in enumerate(text.splitlines()):
            lines.setdefault(f"{path}#{number}", f"{source}: {path}: {line}" if path else f"{source}: {line}")
    return SettingsInvalid("\n".join(lines.values()))


def _setting_of(place: tuple[str | int, ...]) -> str:
    """Return the path of a setting without the names that pydantic gives to the branches of a union."""
    return ".".join(str(part) for part in place if not (isinstance(part, str) and "[" in part))


def _describe_misplaced(model: type[BaseModel], problem: ErrorDetails) -> str:
    """Say where an unknown setting belongs, if it is one of another group or an option of the command."""
    if problem["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        return ""
    name = str(problem["loc"][-1])
    if name in _OPTIONS:
        return f"is an option of the command: serve --{name.replace('_', '-')} {problem['input']}"
    places = [name] if name in model.model_fields else []
    places += [f"{group}.{name}" for group in model.model_fields if name in field_names(model, [group, name])]
    return f"unknown here; {' or '.join(places)}?" if places else ""


def _is_secret(model: type[BaseModel], place: tuple[str | int, ...]) -> bool:
    field = model.model_fields.get(str(place[0])) if place else None
    return field is not None and SecretStr in get_args(field.annotation)


def _has(settings: object, path: list[str]) -> bool:
    for part in path:
        if not isinstance(settings, Mapping) or part not in settings:
            return False
        settings = settings[part]
    return True
