"""Read the settings of the application from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from deployments.config.app import AppConfig
from deployments.config.parts import Settings, merge_group
from deployments.config.settings_errors import SettingsInvalid, settings_error
from deployments.json_types import JsonObject
from deployments.yaml_files import find_empty_names, load_yaml

_CONFIG_FILES = ("config.json", "params.json")  # of transformers, and of Mistral's own format
_MUST_HAVE_VALUES = ("api_key", "keys_file")
_MASK = "**********"  # as pydantic prints a secret


def load_config(path: Path | None, **changes: Any) -> AppConfig:
    """Return the settings of the YAML file, overridden by `changes`. A change of a group leaves its other settings.

    Raises: SettingsInvalid, a ValueError with one line for each mistake; OSError.
    """
    settings = {} if path is None else _read_yaml(path)
    worker, changed = settings.get("worker"), changes.get("worker") or {}
    if isinstance(worker, dict) and ("base_model" in changes or changed.get("device") == "cuda"):
        # it was chosen for the file's base model, on the CPU
        settings = settings | {"worker": {name: value for name, value in worker.items() if name != "quantization"}}
    pairs = {name: (old, changes[name]) for name, old in settings.items() if name in changes}
    groups = {
        name: merge_group(old, new)
        for name, (old, new) in pairs.items()
        if isinstance(old, dict) and isinstance(new, dict)
    }
    try:
        return AppConfig.model_validate(settings | changes | groups)
    except ValidationError as exc:
        raise settings_error(path, AppConfig, exc) from exc


def require_base_model(base: str, engine: Literal["native", "vllm"]) -> None:
    """Refuse a path of a base model that is not there, or that the engine does not read, before anything is started.

    Raises: SettingsInvalid.
    """
    path = Path(base)
    is_file = path.suffix == ".gguf" and path.is_file()
    is_folder = "/" in base and path.is_dir()
    if not (is_file or is_folder or base.startswith(("/", ".")) or base.count("/") > 1):
        return  # the id of a model hub
    has_config = any(path.joinpath(name).is_file() for name in _CONFIG_FILES)
    if not has_config and (is_file or any(path.glob("*.gguf"))):
        if engine == "vllm":
            raise SettingsInvalid(
                f"base_model: {base} is a GGUF file or a folder of them, which engine 'vllm' does not read here; set"
                " worker.engine to native, or name the folder of the same model that has config.json and *.safetensors"
            )
    elif not path.is_dir():
        raise SettingsInvalid(f"base_model: {base}: no such folder or GGUF file")
    elif not has_config:
        raise SettingsInvalid(
            f"base_model: {base} has neither config.json, nor params.json, nor a GGUF file; name the folder of a model"
        )


def require_keys_file(file: Path | None) -> None:
    """Refuse a keys file that does not exist. Raises: SettingsInvalid."""
    if file is not None and not file.is_file():
        raise SettingsInvalid(f"keys_file: {file}: no such file; `loraretriever keys new --file` makes one")


def require_set_keys(config: Settings) -> None:
    """Refuse a key that Serve's own configuration file names without a value. Raises: SettingsInvalid.

    Serve reads that file itself, and an empty value and `null` look the same afterwards. So both are refused.
    """
    for name in _MUST_HAVE_VALUES:
        if name in config.model_fields_set and getattr(config, name) is None:
            raise SettingsInvalid(f"{name} is empty or null; remove the line to run without a key")


def dump_config(config: Settings) -> str:
    """Return the settings as YAML. A secret and the values of environment variables are masked."""
    shown = _with_masked_variables(config.model_dump(mode="json"))
    text: str = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    return text


def _with_masked_variables(value: Any, name: str = "") -> Any:
    """Mask the values of every mapping `env_vars`, such as that of a deployment's `runtime_env`, also in lists.

    Where `env_vars` is no mapping, all of it is masked.
    """
    if name == "env_vars" and value is not None:
        return dict.fromkeys(value, _MASK) if isinstance(value, dict) else _MASK
    if isinstance(value, list):
        return [_with_masked_variables(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _with_masked_variables(item, key) for key, item in value.items()}


def _read_yaml(path: Path) -> JsonObject:
    try:
        text = path.read_text(encoding="utf-8")
        settings = load_yaml(text)
        # The server would start without keys.
        if empty := [name for name in find_empty_names(text) if name in _MUST_HAVE_VALUES]:
            raise SettingsInvalid(f"{path}: {empty[0]} is empty; remove the line to run without a key")
    except FileNotFoundError as exc:
        raise SettingsInvalid(f"{path}: no such file") from exc
    except UnicodeDecodeError as exc:
        raise SettingsInvalid(f"{path}: is not text in UTF-8; save it as UTF-8") from exc
    except yaml.MarkedYAMLError as exc:
        raise SettingsInvalid(f"{path}:{_describe_yaml_problem(exc, text)}") from exc
    except yaml.YAMLError as exc:
        raise SettingsInvalid(f"{path}: invalid YAML: {exc}") from exc
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        kind = "a list" if isinstance(settings, list) else "a single value"
        raise SettingsInvalid(f"{path}: must contain `name: value` lines, got {kind}")
    return settings


def _describe_yaml_problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """Return `line:column: problem`, with the usual mistakes in plain words."""
    mark, problem = error.problem_mark, str(error.problem)
    if mark is None:
        return f" invalid YAML: {problem}"
    before = text.splitlines()[mark.line][: mark.column] if mark.line < len(text.splitlines()) else ""
    if "mapping values" in problem and ":" in before:
        problem = "put quotes around a value that has a colon and a space"
    elif any(part in problem for part in ("mapping values", "<block end>", "<document start>")):
        problem = "indentation does not match the lines above"
    elif "'\\t'" in problem:
        problem = "there is a tab; use spaces"
    return f"{mark.line + 1}:{mark.column + 1}: {problem}"
