"""Find out from a model's files, without loading it, its prompt template and its defaults for sampling."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

from jinja2.exceptions import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpu_worker.errors import SamplingInvalid
from gpu_worker.front.request.request import SAMPLING_DEFAULTS, SamplingParams

logger = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_GENERATION_FILE = "generation_config.json"


def template_of_files(base_model: str) -> Literal["alpaca", "chat", "auto"]:
    """Return what `auto` means for this folder or model hub id; `auto` where its files are not on this machine.

    The files of a model hub are only looked up in the local cache.
    """
    found = chat_templates_of_files(base_model)
    if found is None:
        return "auto"
    return "chat" if found else "alpaca"


def chat_templates_of_files(base_model: str) -> tuple[str, ...] | None:
    """Return the chat templates of this folder or model hub id, None where its files are not on this machine."""
    template, config = _file(base_model, TEMPLATE_FILE), _file(base_model, _CONFIG_FILE)
    if template is not None:
        return (template.read_text(encoding="utf-8"),)
    if config is None:
        return None
    try:
        declared = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except ValueError:
        return None  # the worker reports a broken file when it loads the model
    named = declared if isinstance(declared, list) else [{"template": declared}] if declared else []
    return tuple(str(item["template"]) for item in named)


def sampling_defaults_of_files(base_model: str) -> dict[str, float]:
    """Return the sampling parameters that the model's `generation_config.json` sets, by name; none without the file.

    A value that this server does not support is left out, with a warning. The files of a model hub are only looked up
    in the local cache.
    """
    path = _file(base_model, _GENERATION_FILE)
    if path is None:
        return {}
    try:
        declared = json.loads(path.read_text(encoding="utf-8"))
        given = {name: declared[name] for name in SAMPLING_DEFAULTS if declared.get(name) is not None}
    except (ValueError, AttributeError):
        logger.warning("%s is not a JSON object; its defaults for sampling are not used", path)
        return {}
    return {name: value for name, value in given.items() if _is_supported(name, value, path)}


def _is_supported(name: str, value: float, path: Path) -> bool:
    try:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    except (SamplingInvalid, TypeError) as exc:
        logger.warning("%s: %s; this default is not used", path, exc)
        return False
    return True


def _file(base_model: str, name: str) -> Path | None:
    if Path(base_model).is_dir():
        path = Path(base_model) / name
        return path if path.is_file() else None
    if base_model.count("/") != 1 or base_model.startswith(("/", ".", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache  # imported here, since it takes a third of a second

    found = try_to_load_from_cache(base_model, name)
    return Path(found) if isinstance(found, str) else None


def read_chat_template(path: Path) -> str:
    """Return the operator's template. Raises: ValueError, which names the file and the line; OSError."""
    source = path.read_text(encoding="utf-8")
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError as exc:
        raise ValueError(f"{path}: line {exc.lineno}: {exc.message}") from exc
    return source
